"""A picture of the terminal, made by the program: runs a command in a terminal of its own and draws what is left on the screen.

python scripts/make_picture.py docs/terminal.svg ftrun train recipe=lora_sft ...
"""

from __future__ import annotations

import os
import pty
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 110
CONTROL = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|\x1b\][^\x07]*\x07")


def record(command: list[str]) -> str:
    """Everything that the command writes to a terminal of COLUMNS columns."""
    chunks: list[bytes] = []

    def keep(descriptor: int) -> bytes:
        data = os.read(descriptor, 65536)
        chunks.append(data)
        return data

    os.environ |= {"COLUMNS": str(COLUMNS), "LINES": "50", "TERM": "xterm-256color"}
    os.environ.pop("CI", None)
    status = pty.spawn(command, keep)
    if status:
        raise SystemExit(f"the command ended with status {os.waitstatus_to_exitcode(status)}")
    return b"".join(chunks).decode(errors="replace")


def screen(output: str) -> list[str]:
    """Lines as they stand at the end, colours kept: carriage returns, erased lines and cursor moves are carried out."""
    lines, row, at = [""], 0, 0
    while at < len(output):
        found = CONTROL.match(output, at)
        if found:
            arguments, letter = found[1] or "", found[2]
            if letter == "A":
                row = max(0, row - int(arguments or 1))
            elif letter == "K":
                lines[row] = ""
            elif letter == "m":
                lines[row] += found[0]
            at = found.end()
            continue
        character = output[at]
        if character == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif character == "\r":
            if not output.startswith("\r\n", at):
                lines[row] = ""
        else:
            lines[row] += character
        at += 1
    return lines


def main() -> None:
    target, command = Path(sys.argv[1]), sys.argv[2:]
    shown = screen(record(command))
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.assemble(("$ ", "bold green"), (" ".join(["ftrun", *command[1:]]), "bold")))
    for line in shown:
        console.print(Text.from_ansi(line), soft_wrap=False)
    console.save_svg(str(target), title="ftrun")


if __name__ == "__main__":
    main()
