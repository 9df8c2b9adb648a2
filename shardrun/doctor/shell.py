"""Commands in the syntax of the shell at hand: bash, zsh, fish, PowerShell or cmd."""

from __future__ import annotations

import os
import sys
from pathlib import Path

NAMES = {
    "bash": "bash",
    "sh": "bash",
    "dash": "bash",
    "zsh": "zsh",
    "fish": "fish",
    "pwsh": "powershell",
    "powershell": "powershell",
    "cmd": "cmd",
}
"""Name of a process → the syntax its commands have here."""


def current() -> str:
    """The shell that this process was started from: the nearest one among its parents, or what the environment says."""
    try:
        import psutil

        for parent in psutil.Process().parents():
            name = os.path.splitext(parent.name().lstrip("-").lower())[0]
            # make and the like start `sh` for a moment; the shell that the user types into is further up.
            if name in NAMES and name not in ("sh", "dash"):
                return NAMES[name]
    except Exception:  # psutil is missing or may not look: guess
        pass
    if sys.platform == "win32":
        return "powershell" if "PSModulePath" in os.environ and "PROMPT" not in os.environ else "cmd"
    return NAMES.get(Path(os.environ.get("SHELL", "bash")).name, "bash")


def quoted(text: str, shell: str) -> str:
    """A path or an argument as one word of a command."""
    plain = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./\\:+=,@~%")
    if text and set(text) <= plain - (set("\\") if shell in ("bash", "zsh", "fish") else set()):
        return text
    if shell == "cmd":
        return f'"{text}"'
    if shell == "powershell":
        return "'" + text.replace("'", "''") + "'"
    return "'" + text.replace("'", "\\'" if shell == "fish" else "'\\''") + "'"


def command(words: list[str], shell: str) -> str:
    """A program with its arguments."""
    typed = " ".join(quoted(word, shell) for word in words)
    return f"& {typed}" if shell == "powershell" and typed.startswith("'") else typed


def add_to_path(folder: str, shell: str) -> str:
    """Put a folder at the front of the PATH: now, and (second line) in every shell to come."""
    if shell == "fish":
        return f"fish_add_path {quoted(folder, shell)}"  # keeps it by itself
    if shell in ("powershell", "cmd"):
        # `setx PATH` would cut the PATH off at 1024 characters and write the machine's into the user's.
        front = "'" + folder.replace("'", "''") + ";'"
        keep = (
            f"[Environment]::SetEnvironmentVariable('Path', {front} + "
            "[Environment]::GetEnvironmentVariable('Path', 'User'), 'User')"
        )
        if shell == "powershell":
            return f"$env:Path = {front} + $env:Path\n{keep}"
        return f'set "PATH={folder};%PATH%"\npowershell -Command "{keep}"'
    line = f'export PATH="{folder}:$PATH"'
    return f"{line}\necho {quoted(line, shell)} >> ~/.{shell}rc"


def activate(environment: str, shell: str) -> str:
    """Enter a virtual environment."""
    if shell in ("powershell", "cmd"):
        script = "Activate.ps1" if shell == "powershell" else "activate.bat"
        return command([f"{environment}\\Scripts\\{script}"], shell)
    return f"source {quoted(environment + '/bin/activate' + ('.fish' if shell == 'fish' else ''), shell)}"


def unset(names: list[str], shell: str) -> str:
    """Remove variables from this shell's environment."""
    return {
        "fish": f"set -e {' '.join(names)}",
        "powershell": "Remove-Item " + ", ".join(f"Env:{name}" for name in names),
        "cmd": " & ".join(f'set "{name}="' for name in names),
    }.get(shell, f"unset {' '.join(names)}")


def move_away(path: str, shell: str) -> str:
    """Rename a file so that nothing reads it."""
    program = {"powershell": "Move-Item", "cmd": "move"}.get(shell, "mv")
    return command([program, path, path + ".old"], shell)
