"""What is in a folder: the names of its files, or what is in them."""

from pathlib import Path


def list_files(folder: Path) -> list[str]:
    """Lists the files in a folder and in its subfolders, and the subfolders, by their paths in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def read_files(folder: Path) -> dict[str, str]:
    """Reads the files in a folder and in its subfolders, with a character for each byte."""
    paths = {name: folder / name for name in list_files(folder)}
    return {name: path.read_bytes().decode("latin-1") for name, path in paths.items() if path.is_file()}
