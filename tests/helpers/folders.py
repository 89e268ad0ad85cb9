"""The folders of the repository, the files of a saved model, and what is in any folder."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS_DIR = ROOT / "docs"
MODEL_DIR = ROOT / "hugging_nano_gpt" / "model"

# What save_pretrained writes: the code of the model, the card, two configs and the weights.
CODE_FILES = [path.name for path in MODEL_DIR.glob("*_nano_gpt.py")]
FILES = sorted([*CODE_FILES, "README.md", "config.json", "generation_config.json", "model.safetensors"])


def list_files(folder: Path) -> list[str]:
    """Lists the files in a folder and in its subfolders, and the subfolders, by their paths in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def read_files(folder: Path) -> dict[str, str]:
    """Reads the files in a folder and in its subfolders, with a character for each byte."""
    paths = {name: folder / name for name in list_files(folder)}
    return {name: path.read_bytes().decode("latin-1") for name, path in paths.items() if path.is_file()}
