"""`python -m train.data.tfds_from_folder ROOT DATA_DIR NAME`: make a TFDS data set of a folder of images.

The files are stored unchanged as array_record, to which grain has random access; `dataset=tfds dataset.name=NAME
dataset.root=DATA_DIR` trains on it. DATA_DIR may be a bucket.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from anyup_core import command
from anyup_core.files import describe
from anyup_core.paths import expanded, user_path
from train.size_index import list_images


def write_tfds(root: Path, data_dir: str, name: str, split: str = "train", say: Callable[[str], None] = print) -> int:
    """Write the photographs that a size index of `root` would list as the data set `name`; return how many there are.

    Pipes and devices are left out too; `say` prints a line about what was left out.

    Raises:
        FileNotFoundError: if there are no images.
        FileExistsError: if a data set of this name exists.
        ValueError: if TFDS does not accept the name, or a file name contains a line break.
    """
    import tensorflow_datasets as tfds

    if not (name.isidentifier() and name.islower()):
        raise ValueError(f"NAME={name!r} must be of lower-case letters, digits and underscores.")
    left_out: Counter[str] = Counter()
    listed = list_images(Path(root), left_out)
    paths = [path for path in listed if (root / path).is_file()]
    left_out["pipes, devices and broken links"] += len(listed) - len(paths)
    if not paths:
        raise FileNotFoundError(f"ROOT={root} holds no images that can be read{describe(left_out)}.")
    if told := describe(left_out):
        say(f"{root}: {len(paths)} images{told}")
    classes = sorted({path.split("/")[0] for path in paths})

    class Folder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """A folder of images."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, **options: Any):
            self.name = name
            super().__init__(**options)

        def _info(self) -> tfds.core.DatasetInfo:
            features = dict(image=tfds.features.Image(), label=tfds.features.ClassLabel(names=classes))
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
            for path in paths:
                yield path, dict(image=io.BytesIO((root / path).read_bytes()), label=path.split("/")[0])

    builder = Folder(data_dir=data_dir, file_format="array_record")
    if builder.is_prepared():
        raise FileExistsError(f"{builder.data_path} exists already; choose another NAME or remove it.")
    builder.download_and_prepare()
    return len(paths)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status, see `anyup_core.command`."""
    about = "Make a TFDS data set of a folder of photographs."
    parser = argparse.ArgumentParser(prog="python -m train.data.tfds_from_folder", description=about)
    parser.add_argument("root", metavar="ROOT", type=user_path, help="root/class/file")
    parser.add_argument("data_dir", type=expanded, metavar="DATA_DIR", help="where TFDS keeps data sets")
    parser.add_argument("name", metavar="NAME", help="of the data set")
    parser.add_argument("--split", default="train", help="default: %(default)s")

    def work() -> None:
        args = parser.parse_args(arguments)
        count = write_tfds(args.root, args.data_dir, args.name, args.split)
        print(f"{args.name}: {count} images in {args.data_dir}; train with dataset=tfds dataset.name={args.name} "
              f"dataset.root={args.data_dir}")  # fmt: skip

    return command.execute(work)


if __name__ == "__main__":
    sys.exit(main())
