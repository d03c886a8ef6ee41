"""Where the files lie that come with the package: recipes, configurations of accelerate, the metric for Evaluate.

python -m charformer_training.shipped accelerate/fsdp2.yaml    # prints its path
"""

import sys
from pathlib import Path


FOLDERS = ("accelerate", "bits_per_character", "configs")


def shipped_path(name: str) -> Path:
    """The path of `name`, such as `"bits_per_character"` or `"accelerate/fsdp2.yaml"`, in a clone or an installed package.

    Raises:
        FileNotFoundError: If no such file comes with the package.
    """
    here = Path(__file__).parent
    # A wheel has the folders in the package, a clone beside it (pyproject.toml, force-include).
    root = here if (here / FOLDERS[0]).is_dir() else here.parent
    path = root / name
    if name.split("/")[0] not in FOLDERS or not path.exists():
        names = sorted(f"{folder}/{file.name}" for folder in FOLDERS for file in (root / folder).glob("*.*"))
        raise FileNotFoundError(f"no file {name!r} comes with the package; there are {', '.join(names)}")
    return path


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(shipped_path(sys.argv[1]))
    except FileNotFoundError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
