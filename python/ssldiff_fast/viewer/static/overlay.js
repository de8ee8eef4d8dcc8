// SPDX-License-Identifier: Apache-2.0
// What is laid over an image: pictures stretched over a rectangle of its level-0 pixels.

import { colour, TISSUE, VALID } from "./colour.js";

/** A layer: `picture(pane)` is a canvas or null, `rect(pane)` its [x, y, width, height]. */
export class Layer {
  constructor(name, title) {
    Object.assign(this, { name, title, on: false, opacity: 0.5, smooth: false });
  }

  /** Fetches what the layer shows; called when it is first switched on. */
  async load() {}

  /** The value at a level-0 position as text, or "". */
  valueAt() {
    return "";
  }
}

/** Tissue, tinted; each image has its own mask. */
export class MaskLayer extends Layer {
  constructor(images) {
    super("mask", "Tissue mask");
    this.images = images;
    this.pictures = images.map(() => null);
    this.opacity = 0.35;
    this.smooth = true;
  }

  async load() {
    await Promise.all(this.images.map(async (image, index) => {
      if (image.mask) this.pictures[index] = await tinted(`masks/${index}.png`);
    }));
  }

  picture(index) {
    return this.pictures[index];
  }

  rect(index) {
    return [0, 0, this.images[index].width, this.images[index].height];
  }
}

/** One value for each cell of a grid, in the same place on both images. */
class CellLayer extends Layer {
  constructor(about, title) {
    super(about.name, title);
    this.about = about;
    this.canvas = null;
    this.values = null;
  }

  async load() {
    const { rows, columns } = this.about;
    this.values = new Float32Array(await (await get(`cells/${this.name}`)).arrayBuffer());
    const pixels = new ImageData(columns, rows);
    this.values.forEach((value, i) => pixels.data.set(this.paint(value), 4 * i));
    const canvas = document.createElement("canvas");
    canvas.width = columns;
    canvas.height = rows;
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    this.canvas = canvas;
  }

  picture(index) {
    return this.about.rects[index] ? this.canvas : null;
  }

  rect(index) {
    return this.about.rects[index];
  }

  /** The value of the cell under a position, or undefined. */
  cellAt(index, x, y) {
    const rect = this.about.rects[index];
    if (!this.values || !rect) return undefined;
    const column = Math.floor(((x - rect[0]) / rect[2]) * this.about.columns);
    const row = Math.floor(((y - rect[1]) / rect[3]) * this.about.rows);
    const inside = column >= 0 && row >= 0 && column < this.about.columns && row < this.about.rows;
    return inside ? { value: this.values[row * this.about.columns + column], row, column } : undefined;
  }
}

/** Valid cells tinted. */
export class GridLayer extends CellLayer {
  constructor(about) {
    super(about, "Grid cells");
    this.opacity = 0.3;
    this.lines = true;
  }

  paint(value) {
    return value > 0 ? [...VALID, 255] : [0, 0, 0, 0];
  }

  valueAt(index, x, y) {
    const cell = this.cellAt(index, x, y);
    if (!cell) return "";
    return `cell (${cell.row}, ${cell.column}) ${cell.value > 0 ? "valid" : "not valid"}`;
  }
}

/** The cosine of each cell as a heat map. */
export class SimilarityLayer extends CellLayer {
  constructor(about) {
    super(about, "Similarity");
    this.opacity = 0.55;
  }

  paint(value) {
    if (Number.isNaN(value)) return [0, 0, 0, 0];
    const [low, high] = this.about.range;
    return [...colour((value - low) / (high - low)), 255];
  }

  valueAt(index, x, y) {
    const cell = this.cellAt(index, x, y);
    if (!cell) return "";
    return `similarity ${Number.isNaN(cell.value) ? "not measured" : cell.value.toFixed(3)}`;
  }
}

/** Draws every layer that is on over one pane. */
export function drawLayers(context, layers, pane) {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = context.canvas;
  if (context.canvas.width !== Math.round(width * ratio)
      || context.canvas.height !== Math.round(height * ratio)) {
    context.canvas.width = Math.round(width * ratio);
    context.canvas.height = Math.round(height * ratio);
  }
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  for (const layer of layers) {
    const picture = layer.on && layer.picture(pane.index);
    if (picture) drawLayer(context, layer, picture, pane);
  }
}

function drawLayer(context, layer, picture, pane) {
  const [x, y, w, h] = layer.rect(pane.index);
  const from = pane.toScreen(x, y);
  const to = pane.toScreen(x + w, y + h);
  context.globalAlpha = layer.opacity;
  context.imageSmoothingEnabled = layer.smooth;
  context.drawImage(picture, from.x, from.y, to.x - from.x, to.y - from.y);
  context.globalAlpha = 1;
  if (layer.lines) drawLines(context, layer.about, from, to);
}

// Lines closer than this on the screen would hide the image.
const LINES_PX = 12;

function drawLines(context, { rows, columns }, from, to) {
  const step = (to.x - from.x) / columns;
  if (step < LINES_PX) return;
  const { clientWidth: width, clientHeight: height } = context.canvas;
  context.strokeStyle = `rgb(${VALID.join(" ")} / 60%)`;
  context.lineWidth = 1;
  context.beginPath();
  for (let i = Math.max(0, Math.floor(-from.x / step)); i <= columns; i += 1) {
    const x = Math.round(from.x + i * step) + 0.5;
    if (x > width) break;
    context.moveTo(x, Math.max(0, from.y));
    context.lineTo(x, Math.min(height, to.y));
  }
  const stepY = (to.y - from.y) / rows;
  for (let i = Math.max(0, Math.floor(-from.y / stepY)); i <= rows; i += 1) {
    const y = Math.round(from.y + i * stepY) + 0.5;
    if (y > height) break;
    context.moveTo(Math.max(0, from.x), y);
    context.lineTo(Math.min(width, to.x), y);
  }
  context.stroke();
}

/** Fetches, or throws what the server said. */
export async function get(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

async function tinted(address) {
  const bitmap = await createImageBitmap(await (await get(address)).blob());
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.set([...TISSUE, pixels.data[i]], i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}
