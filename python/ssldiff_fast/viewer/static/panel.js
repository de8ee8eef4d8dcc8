// SPDX-License-Identifier: Apache-2.0
// The list of overlays: a switch, an opacity and a legend for each.

import { paintLegend, TISSUE, VALID } from "./colour.js";
import { make } from "./pane.js";
import { count } from "./units.js";

const ABOUT = { mask: aboutMask, grid: aboutGrid, similarity: aboutSimilarity };

/**
 * Adds a layer to the panel.
 *
 * @returns {function} that switches the layer on and off
 */
export function addOverlay(panel, layer, scene, redraw, notify) {
  const box = make("div", { className: "overlay", id: `overlay-${layer.name}` });
  const label = make("label");
  const check = make("input", { type: "checkbox" });
  label.append(check, make("span", { className: "name", textContent: layer.title }));
  const strength = make("label", { textContent: "Opacity" });
  const range = make("input", { type: "range", min: 5, max: 100, value: 100 * layer.opacity });
  range.setAttribute("aria-label", `Opacity of ${layer.title.toLowerCase()}`);
  strength.append(range);
  const status = make("p");
  status.setAttribute("role", "status");
  const details = make("div", { hidden: true });
  details.append(strength, ...ABOUT[layer.name](layer, scene));
  box.append(label, status, details);
  panel.append(box);

  let loading = null;
  async function show() {
    layer.on = check.checked;
    details.hidden = !layer.on;
    if (layer.on) {
      status.textContent = "Loading…";
      try {
        loading ??= layer.load();
        await loading;
        status.textContent = "";
      } catch (error) {
        loading = null;
        layer.on = false;
        check.checked = false;
        details.hidden = true;
        status.textContent = "";
        notify(`${layer.title}: ${error.message}.`);
      }
    }
    redraw();
  }
  check.onchange = show;
  range.oninput = () => {
    layer.opacity = range.value / 100;
    redraw();
  };
  return () => {
    check.checked = !check.checked;
    return show();
  };
}

function row(colour, words) {
  const label = make("p");
  const swatch = make("span", { className: "swatch" });
  swatch.style.display = "inline-block";
  swatch.style.marginRight = "8px";
  swatch.style.verticalAlign = "-2px";
  swatch.style.background = `rgb(${colour.join(" ")})`;
  label.append(swatch, words);
  return label;
}

function aboutMask(layer, scene) {
  const missing = scene.images.filter((image) => !image.mask).map((image) => image.name);
  const parts = [row(TISSUE, "tissue")];
  if (missing.length) {
    parts.push(make("p", { textContent: `None for ${missing.join(", ")}, whose mpp is not known.` }));
  }
  return parts;
}

function aboutGrid({ about }) {
  const cells = `${count(about.valid)} of ${count(about.rows * about.columns)} cells are valid`;
  const parts = [row(VALID, "valid cell"), make("p", { textContent: `${cells}.` })];
  if (about.encoder) parts.push(make("p", { textContent: `Encoder: ${about.encoder}` }));
  return parts;
}

function aboutSimilarity({ about }) {
  const legend = make("div", { className: "legend" });
  const canvas = make("canvas");
  const [low, high] = about.range;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Colours from ${low.toFixed(3)} to ${high.toFixed(3)}`);
  paintLegend(canvas);
  const ends = make("div", { className: "ends" });
  ends.append(
    make("span", { textContent: `≤ ${low.toFixed(3)}` }),
    make("span", { textContent: `≥ ${high.toFixed(3)}` }),
  );
  legend.append(canvas, ends);
  const { summary } = about;
  const words = `Cosine of each cell's embedding with that of ${about.against || "the other"}: `
    + `mean ${summary.mean.toFixed(3)} over ${count(summary.cells)} cells, half of them from `
    + `${summary.q25.toFixed(3)} to ${summary.q75.toFixed(3)}.`;
  const parts = [legend, make("p", { textContent: words })];
  if (about.encoder) parts.push(make("p", { textContent: `Encoder: ${about.encoder}` }));
  return parts;
}
