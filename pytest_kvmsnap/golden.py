"""Golden images as people name them: which file, in which format, for what kind of machine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from pytest_kvmsnap.errors import ConfigError

Format = Literal["qcow2", "raw"]

_FORMATS: dict[str, Format] = {".qcow2": "qcow2", ".raw": "raw", ".img": "raw"}
_QCOW2_HEADER = b"QFI\xfb"


class NamedFile(NamedTuple):
    """A file as somebody named it. `folder` is the one of the file (or shell) that did."""

    name: str
    folder: Path

    def find(self, what: str, image_path: tuple[Path, ...], where: str) -> Path:
        """Return where the file is: beside what names it, else in a folder of `image-path`.

        Raises:
            ConfigError: it is in none of them.
        """
        name = Path(self.name).expanduser()
        searched = [(place / name).absolute() for place in (self.folder, *image_path)]
        for path in searched:
            if path.is_file():
                return path
        tried = "\n".join(dict.fromkeys(map(str, searched)))
        raise ConfigError(
            f"there is no {what} {self.name!r}",
            where=where,
            why=f"looked for\n{tried}",
            cure="a path is relative to the file that names it, then to the folders of"
            " --kvmsnap-image-path",
        )


@dataclass(frozen=True)
class Golden:
    """A throwaway machine on a thin copy of an image.

    `memory` (bytes) and `vcpus` are None where the template, or the built-in machine, decides.
    `folders` are those in which backing files of the image may be.
    """

    image: Path
    format: Format
    memory: int | None = None
    vcpus: int | None = None
    template: Path | None = None
    folders: tuple[Path, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return self.image.name


def format_of(image: Path, where: str) -> Format:
    """Return the format of an image, by its name: what the file says of itself is not believed.

    Distributions call raw images `.img`, and qcow2 ones too. What begins like qcow2 under that name
    may be either: a guest can write such a header into its raw disk.

    Raises:
        ConfigError: the name does not tell it.
    """
    suffix = image.suffix.lower()
    what = f"the name of the golden image {image.name!r} does not tell its format"
    if suffix not in _FORMATS:
        raise ConfigError(
            what, where=where, cure=f"give it one of these endings: {', '.join(_FORMATS)}"
        )
    if suffix == ".img" and _begins_like_qcow2(image):
        raise ConfigError(
            what,
            where=where,
            why=".img stands for raw, and this one begins like a qcow2 image",
            cure="name it .qcow2 if that is what it is, or .raw if these are a raw disk's bytes",
        )
    return _FORMATS[suffix]


def _begins_like_qcow2(image: Path) -> bool:
    try:
        with image.open("rb") as file:
            return file.read(len(_QCOW2_HEADER)) == _QCOW2_HEADER
    except OSError:  # told by those who look into it
        return False
