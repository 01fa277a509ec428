"""A model for images of 13 bands, as Sentinel-2's: trained from scratch, loaded, and guided by all bands."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile
import yaml

import anyup_jax
from anyup_jax import encoders

root, random = Path(__file__).resolve().parents[2], np.random.default_rng(0)
with tempfile.TemporaryDirectory() as folder:
    for number in range(8):  # in the place of tiles of yours, root/class/file, as TIFF or NPY
        fields = random.integers(300, 3000, (6, 6, 13), np.uint16).repeat(16, 0).repeat(16, 1)
        Path(folder, "tiles", "region").mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(f"{folder}/tiles/region/{number}.tif", fields, photometric="minisblack", planarconfig="contig")
    command = f"""-m train.run model.input_dim=13 model.qk_dim=16 model.backend=tiled
        dataset=folder dataset.root={folder}/tiles dataset.encoder_bands=[3,2,1] dataset.encoder_range=[0,3000]
        dataset.crop_size=64 dataset.img_size=32 dataset.num_local_crops=2
        encoders.lite0.layer=[2] batch_size=4 max_steps=4 log.pictures_every=0 log.tensorboard=false
        output_dir={folder}/run"""
    subprocess.run([sys.executable, *command.split()], cwd=root, check=True, stdout=subprocess.DEVNULL)
    model = anyup_jax.from_pretrained(f"{folder}/run")
    data = yaml.safe_load(Path(folder, "run", "config.yaml").read_text())["dataset"]  # with what was measured
    tile = np.float32(tifffile.imread(f"{folder}/tiles/region/0.tif"))[None]

guidance = (tile - np.float32(data["mean"])) / np.float32(data["std"])
encoder = encoders.create("efficientnet_lite0", layer=2)
features = encoder(encoder.normalize(np.clip(tile[..., [3, 2, 1]] / 3000, 0, 1)))
hr = anyup_jax.upsample(model, guidance, features)
assert features.min() - 1e-3 <= hr.min() < hr.max() <= features.max() + 1e-3  # averages of the features
print("Sentinel-2:", guidance.shape, features.shape, "->", hr.shape)
