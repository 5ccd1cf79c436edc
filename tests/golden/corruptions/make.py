"""Writes scripts.npz: what the scripts that made ImageNet-C and CIFAR-10-C make of one picture, for test_corrupting.py.

    git clone https://github.com/hendrycks/robustness && git -C robustness checkout 8190fe3
    apt-get install libmagickwand-6.q16-6
    python -m venv aside && aside/bin/pip install wand==0.7.2 scikit-image==0.26.0 opencv-python==5.0.0.93 scipy pillow
    aside/bin/pip install --no-deps imagecorruptions==1.1.2      # for its photographs, the scripts' own
    aside/bin/python tests/golden/corruptions/make.py robustness

The scripts' functions are run as they are but for names that NumPy 2, SciPy and scikit-image have since renamed, and
for impulse noise, which scikit-image now draws from a generator of its own: the same two draws come from NumPy's.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

SIZES = {"imagenet": 224, "cifar": 32}
NAMES = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
RENAMED = {
    "from scipy.ndimage.interpolation import": "from scipy.ndimage import",
    "np.float_": "float",
    "multichannel=True": "channel_axis=-1",
    "np.fromstring": "np.frombuffer",
    ", mode='L')": ")",
    "x = sk.util.random_noise(np.array(x) / 255., mode='s&p', amount=c)": "x = np.array(x) / 255.; "
    "f = np.random.random(x.shape) <= c; s = np.random.random(x.shape) <= .5; x[f & s] = 1; x[f & ~s] = 0",
}


def picture(size: int) -> np.ndarray:
    """Slopes, stripes and a rectangle, (size, size, 3) uint8, in whole numbers only."""
    row, column = np.mgrid[:size, :size] * 224 // size
    x = np.stack(
        [row + column // 8, (row * 3 // 4 + 2 * column) % 256, 255 - (row // 8 % 4) * 50 - column // 4], axis=2
    )
    x[40:90, 60:180] //= 3
    return x.clip(0, 255).astype(np.uint8)


def script(checkout: Path, name: str) -> SimpleNamespace:
    """The functions of make_<name>_c.py."""
    text = (checkout / f"ImageNet-C/create_c/make_{name}_c.py").read_text()
    text = text[text.index("import skimage as sk") : text.index("# /////////////// End Distortions")]
    found = find_spec("imagecorruptions")
    for old, new in (RENAMED | {"'./frost": f"'{Path(found.origin).parent}/frost/frost"}).items():
        text = text.replace(old, new)
    names: dict = {"np": np}
    exec(text, names)
    return SimpleNamespace(**names)


def main() -> None:
    """Some pixels of every corruption at every severity, and NumPy's global state seeded with the severity."""
    found = {}
    for kind, size in SIZES.items():
        functions = script(Path(sys.argv[1]), kind)
        for name in NAMES:
            for severity in range(1, 6):
                np.random.seed(severity)
                pixels = np.uint8(getattr(functions, name)(Image.fromarray(picture(size)), severity))
                found[f"{kind}/{name}/{severity}"] = pixels[3 :: size // 8, 1 :: size // 8]
    np.savez_compressed(Path(__file__).with_name("scripts.npz"), **found)


if __name__ == "__main__":
    main()
