"""The page of the encapsulated report: lesion table and pictures, without any name or number of the patient."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATEMENT = "Research use only. Not a medical device. Do not use these results for the care of a patient."
ROWS = 20


def draw_page(table: Mapping[str, Any], preview: Path | None) -> bytes:
    """Return a PDF of one A4 page. Equal content gives equal bytes.

    Parameters
    ----------
    table
        Content of lesions.json.
    preview
        Picture of this case and of no other. None: the page has no picture.
    """
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(8.27, 11.69))
    FigureCanvasPdf(figure)
    head = f"Liver {table['liver_ml']:.0f} mL, lesions {table['lesion_count']}, {table['lesion_ml']:.1f} mL"
    figure.text(0.08, 0.95, "Liver lesions, computed by adflows", size=16, weight="bold")
    figure.text(0.08, 0.925, STATEMENT, size=8)
    figure.text(0.08, 0.895, head, size=11)
    lines = [f"{'No.':>4}{'mL':>10}{'largest mm':>13}{'mean HU':>10}{'mean probability':>19}"]
    for row in table["lesions"][:ROWS]:
        hu = row.get("mean_hu")
        shown = f"{row['id']:>4}{row['volume_mm3'] / 1000:>10.2f}{row['diameter_mm']:>13.1f}"
        lines.append(f"{shown}{'' if hu is None else f'{hu:.0f}':>10}{row['mean_probability']:>19.2f}")
    if table["lesion_count"] > ROWS:
        lines.append(f"The {ROWS} largest of {table['lesion_count']} lesions are listed.")
    figure.text(0.08, 0.875, "\n".join(lines), size=9, family="monospace", va="top")
    if preview is not None:
        with Image.open(preview) as opened:
            picture = opened.convert("RGB")
        axes = figure.add_axes((0.08, 0.08, 0.84, 0.42))
        axes.imshow(picture)
        axes.set_axis_off()
    stream = io.BytesIO()
    figure.savefig(stream, format="pdf", metadata={"CreationDate": None})
    return stream.getvalue()
