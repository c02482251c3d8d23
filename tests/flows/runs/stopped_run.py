"""A command with one device step, for tests that stop or kill it while it waits for the CPU."""

from __future__ import annotations

from flows.machine.own_server import prepare_prefect

if __name__ == "__main__":
    prepare_prefect()
    import typer

    from flows.cli import app
    from flows.cli.options import run_flow
    from flows.machine.terminal import terminal
    from flows.runs.flow import define_flow
    from flows.runs.outcome import Outcome
    from flows.runs.runner import new_runner
    from medad.base.settings import ANY_MACHINE
    from tests.flows.device_jobs import probing

    @define_flow("waits", "liver tiny")
    def waits() -> Outcome:
        """Run one device step."""
        runner = new_runner(ANY_MACHINE, refresh=False)
        runner.run("case", probing("x"))
        return Outcome.from_runner(runner)

    app.app = typer.Typer(pretty_exceptions_enable=False)

    @app.app.command()
    def main() -> None:
        """Run the flow under Prefect's temporary server."""
        terminal.enabled = True
        run_flow(waits)

    app.main()
