"""Precision of an encoder on the devices that a run may use. A key contains it, because it changes features."""

from __future__ import annotations

from flows.devices.slots import allowed_devices
from medad.base.settings import MachineSettings
from zsad.config.run import EncoderSettings


def with_precision(settings: EncoderSettings, machine: MachineSettings) -> EncoderSettings:
    """Return settings in which a precision `auto` became that of the devices. All GPUs of a machine get the same.

    Raises ConfigError for a GPU that does not exist.
    """
    from medad.base.devices import gpu_capability
    from zsad.clip.precision import effective_precision

    on_gpu = settings.precision == "auto" and allowed_devices(machine.gpus)[0].torch_name != "cpu"
    precision = effective_precision(settings.precision, gpu_capability() if on_gpu else None)
    return settings.model_copy(update={"precision": precision})
