"""The table of docs/fault_tolerance.md, from the figures that the scripts here left.

python tests/reliability/table.py      puts it there
"""

import json
from pathlib import Path

from figures import RESULTS, ROOT

DOCUMENT = ROOT / "docs/fault_tolerance.md"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->"

# Row of a file of figures: the fault, what was done how often, what became of it.
ROWS = {
    "kills": (
        "SIGKILL of a training run",
        "{kills} kills in {chains} runs of {steps} steps: {kills_in_start-up} while starting, "
        "{kills_in_step} in steps, {kills_in_save} in saves",
        "{chains_that_differ} of them ended otherwise than an undisturbed run ({failures}); at "
        "most {most_steps_done_again} steps were done again, with a save every {checkpoint_every}",
    ),
    "flips": (
        "a damaged checkpoint",
        "{damages} damages over {files_damaged} of {files} files: {flips} flipped bits, "
        "{truncations} truncations, {deletions} deletions",
        "{found_named_and_fallen_back} found, named, and the step before restored bit for bit",
    ),
    "disk": (
        "a full disk, one that becomes read-only, one that vanishes",
        "{runs} runs on a disk of their own, stopping at the first failed save or bearing it",
        "{not_as_they_must_be} lost a step or ended with another state",
    ),
    "atomic": (
        "SIGKILL of convert, export and embed over an old folder",
        "{kills} kills",
        "{old} left the old folder, {new} the new one, {failed} anything else; "
        "{left_behind} leftovers beside it, {removed_by_the_next} removed by the next command",
    ),
    "fuzz": (
        "hostile input, read in process",
        "{inputs} inputs",
        "{ok} read, {refused} refused in one line, {findings} anything else; the slowest "
        "{slowest_seconds} s, at most {peak_rss_mib} MiB",
    ),
    "fuzz_lora": (
        "hostile LoRA files: merged, printed, and as a student's start",
        "{inputs} inputs",
        "{ok} read, {refused} refused in one line, {findings} anything else; the slowest "
        "{slowest_seconds} s, at most {peak_rss_mib} MiB",
    ),
    "fuzz_commands": (
        "the same given to real commands",
        "{inputs} commands",
        "{ok} ended with 0, {refused} with 2 or 3, {findings} with anything else; the slowest "
        "{slowest_seconds} s, at most {peak_rss_mib} MiB",
    ),
    "soak": (
        "a long run with saves, previews and other commands beside it",
        "{steps} steps, {saves} saves, {previews} previews, {commands} commands",
        "memory {rss_mib_second_tenth} MiB in the second tenth and {rss_mib_last_tenth} in the "
        "last, open files {files_second_tenth} and {files_last_tenth}, threads "
        "{threads_second_tenth} and {threads_last_tenth}, a step {step_ms_second_tenth} ms and "
        "{step_ms_last_tenth}",
    ),
}


def table(folder: Path = RESULTS) -> str:
    """One row for each file of figures; "not yet run" where there is none."""
    lines = ["| fault | done | found | command | date, seconds |", "|---|---|---|---|---|"]
    for name, (fault, done, found) in ROWS.items():
        path = folder / f"{name}.json"
        if not path.is_file():
            lines.append(f"| {fault} | not yet run | | | |")
            continue
        figures = json.loads(path.read_text())
        cells = fault, *(text.format_map(figures) for text in (done, found))
        command, when = figures["command"], f"{figures['date']}, {figures['seconds']:.0f}"
        lines.append(f"| {' | '.join(cells)} | `{command}` | {when} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    before, rest = DOCUMENT.read_text().split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(before + BEGIN + table() + END + after)


if __name__ == "__main__":
    main()
