// SPDX-License-Identifier: Apache-2.0
// Colours of the overlays: told apart with any colour vision, and not those of a stain.

// Viridis at equal steps; between them colours are mixed linearly.
const SCALE = [
  [68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141],
  [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37],
];

export const TISSUE = [0, 150, 136];
export const VALID = [30, 100, 230];

/** The colour of a share from 0 to 1. */
export function colour(share) {
  const place = Math.min(1, Math.max(0, share)) * (SCALE.length - 1);
  const low = Math.min(SCALE.length - 2, Math.floor(place));
  return SCALE[low].map((value, i) => value + (place - low) * (SCALE[low + 1][i] - value));
}

/** Paints a legend from low (left) to high (right). */
export function paintLegend(canvas) {
  canvas.width = 256;
  canvas.height = 1;
  const pixels = new ImageData(256, 1);
  for (let i = 0; i < 256; i += 1) pixels.data.set([...colour(i / 255), 255], 4 * i);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}
