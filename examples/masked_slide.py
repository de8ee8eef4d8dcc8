# SPDX-License-Identifier: Apache-2.0
"""A synthetic slide after a real one, of its tissue alone.

    python examples/masked_slide.py [slide.svs] [out.tif]

Without a slide a drawn one stands in: a disk of tissue on white.
"""

import sys

import numpy as np

import ssldiff_fast as sf
from ssldiff_fast.slides.images import ImageSlide

model = sf.load("he-demo")
if len(sys.argv) > 1 and sys.argv[1] != "-":
    grid = sf.encode(sys.argv[1], model.encoder)
else:
    y, x = np.mgrid[:384, :384]
    tissue = (y - 180) ** 2 + (x - 150) ** 2 < 110**2
    grain = np.random.default_rng(0).normal(0, 18, (384, 384, 3))
    colour = np.where(tissue[..., None], np.array([190.0, 110.0, 160.0]) + grain, 244.0)
    slide = ImageSlide(colour.clip(0, 255).astype(np.uint8), 0.5)
    grid = sf.encode(slide, model.encoder)
print(grid)  # grid.valid is the tissue mask: True where a cell holds tissue

# grid.valid may be edited: here the last row of cells is left white.
grid.valid[-1] = False
out = sys.argv[2] if len(sys.argv) > 2 else "masked.tif"
# Windows without tissue are not evaluated; they become glass, with a soft edge.
done = sf.synthesize(model, grid, out, steps=4, mask=True, overwrite=True, progress=False)
print(f"{done.path}: {done.size_px[0]} x {done.size_px[1]} pixels at {done.mpp:g} um")
print(f"the mask saved {done.evaluations_saved} network evaluations beside {done.evaluations}")
