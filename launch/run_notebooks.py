"""Run notebooks/*.py and write their .ipynb with outputs, as people read them.

python launch/run_notebooks.py [NAME ...]     (pip install -e '.[torch,notebooks]' first)

Each notebook runs in an empty folder. Logs and progress bars (stderr) are left out, pictures are
kept as PNG of at most 256 colours.
"""

import base64
import io
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
MAX_BYTES = 400_000  # of a notebook with its outputs


def small_png(text: str) -> str:
    """Encode a base64 PNG again, with a palette where that is smaller."""
    image = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
    encoded = []
    for version in (image, image.quantize(256)):
        buffer = io.BytesIO()
        version.save(buffer, "PNG", optimize=True)
        encoded.append(buffer.getvalue())
    return base64.b64encode(min(encoded, key=len)).decode()


def small_outputs(outputs: list) -> list:
    """Outputs without stderr; lines printed in a row are one output, a picture is PNG alone."""
    kept = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            continue
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
            continue
        if "image/png" in output.get("data", {}):
            output.data = {
                "image/png": small_png(output.data["image/png"]),
                "text/plain": "<picture>",
            }
            output.metadata = {}
        kept.append(output)
    return kept


def run(path: Path) -> Path:
    """Run a notebook top to bottom and write its .ipynb beside it; return the .ipynb."""
    notebook = jupytext.read(path)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()
    for number, cell in enumerate(notebook.cells, 1):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = small_outputs(cell.outputs)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    text = nbformat.writes(notebook, version=4) + "\n"
    if len(text) > MAX_BYTES:
        raise SystemExit(f"{path}: found {len(text)} bytes of output; expected {MAX_BYTES} or less")
    out = path.with_suffix(".ipynb")
    out.write_text(text)
    return out


def main(names: list[str]) -> None:
    paths = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.py"))}
    if unknown := set(names) - paths.keys():
        raise SystemExit(f"notebook: found {unknown.pop()!r}; expected some of {', '.join(paths)}")
    for name in names or paths:
        start = time.perf_counter()
        out = run(paths[name])
        seconds, kilobytes = time.perf_counter() - start, out.stat().st_size / 1000
        print(f"{out.name}: {seconds:.0f} s, {kilobytes:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
