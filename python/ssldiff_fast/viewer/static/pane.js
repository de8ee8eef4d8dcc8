// SPDX-License-Identifier: Apache-2.0
// One image: OpenSeadragon, the overlays over it, and its scale bar.

import { drawLayers } from "./overlay.js";
import { count, length, roundLength } from "./units.js";

/* global OpenSeadragon */

const BAR_PX = 140; // the scale bar is at most this long
const CLOSEST = 16; // screen pixels for one of the image's
const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

export class Pane {
  /**
   * @param {object} image what the server says of it
   * @param {number} index its number
   * @param {Layer[]} layers the overlays
   */
  constructor(image, index, layers) {
    Object.assign(this, { image, index, layers });
    this.element = this.#makeElement();
    this.context = this.element.querySelector(".over").getContext("2d");
    this.listeners = { move: [], pointer: [], lead: [], failed: [] };
  }

  /** Opens the image; the element must be in the page. */
  open() {
    const { width, height, tile } = this.image;
    this.viewer = OpenSeadragon({
      element: this.element.querySelector(".view"),
      tileSources: {
        Image: {
          xmlns: "http://schemas.microsoft.com/deepzoom/2008",
          Url: `images/${this.index}_files/`,
          Format: "jpeg",
          Overlap: "0",
          TileSize: String(tile),
          Size: { Width: String(width), Height: String(height) },
        },
      },
      drawer: "canvas",
      showNavigationControl: false,
      showNavigator: true,
      navigatorPosition: "TOP_RIGHT",
      navigatorSizeRatio: 0.18,
      navigatorAutoFade: false,
      navigatorBackground: "#f4f5f7",
      navigatorDisplayRegionColor: "#c2185b",
      keyboardNavEnabled: false, // the page has its own keys, for both panes at once
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { clickToZoom: false, dblClickToZoom: true, pinchRotate: false },
      animationTime: calm ? 0 : 0.5,
      visibilityRatio: 0.2,
      maxZoomPixelRatio: CLOSEST,
      minZoomImageRatio: 0.5,
      imageLoaderLimit: 6,
      timeout: 300000, // the first look at a slide without levels takes its time
    });
    // Over the tiles, and under the navigator.
    this.viewer.canvas.append(this.context.canvas);
    this.viewer.addHandler("update-viewport", () => this.draw());
    this.viewer.addHandler("viewport-change", () => this.#tell("move"));
    this.viewer.addHandler("tile-load-failed", (e) => this.#tell("failed", e.message));
    for (const name of ["canvas-press", "canvas-scroll", "canvas-double-click", "canvas-pinch"]) {
      this.viewer.addHandler(name, () => this.#tell("lead"));
    }
    const stage = this.element.querySelector(".stage");
    stage.addEventListener("focus", () => this.#tell("lead"));
    stage.addEventListener("pointermove", (e) => this.#tell("pointer", this.#under(e)));
    stage.addEventListener("pointerleave", () => this.#tell("pointer", null));
    return new Promise((resolve, reject) => {
      this.viewer.addOnceHandler("open", () => resolve(this));
      this.viewer.addOnceHandler("open-failed", (e) => reject(new Error(e.message)));
    });
  }

  on(name, listener) {
    this.listeners[name].push(listener);
  }

  #tell(name, value) {
    for (const listener of this.listeners[name]) listener(this, value);
  }

  /** Level-0 pixels to CSS pixels of the stage. */
  toScreen(x, y) {
    const { viewport } = this.viewer;
    return viewport.pixelFromPoint(viewport.imageToViewportCoordinates(x, y), true);
  }

  #under(event) {
    const box = this.element.querySelector(".stage").getBoundingClientRect();
    const { viewport } = this.viewer;
    const at = new OpenSeadragon.Point(event.clientX - box.left, event.clientY - box.top);
    return viewport.viewportToImageCoordinates(viewport.pointFromPixel(at, true));
  }

  /** What is seen now: centre in level-0 pixels, and screen pixels for one of the image's. */
  get place() {
    const { viewport } = this.viewer;
    const centre = viewport.viewportToImageCoordinates(viewport.getCenter(true));
    return { x: centre.x, y: centre.y, zoom: viewport.viewportToImageZoom(viewport.getZoom(true)) };
  }

  /** Shows another place, at once. */
  set place({ x, y, zoom }) {
    const { viewport } = this.viewer;
    viewport.zoomTo(viewport.imageToViewportZoom(zoom), null, true);
    viewport.panTo(viewport.imageToViewportCoordinates(x, y), true);
  }

  zoomBy(factor) {
    this.#tell("lead");
    this.viewer.viewport.zoomBy(factor);
    this.viewer.viewport.applyConstraints();
  }

  panBy(shareX, shareY) {
    this.#tell("lead");
    const { viewport } = this.viewer;
    const bounds = viewport.getBounds();
    viewport.panBy(new OpenSeadragon.Point(shareX * bounds.width, shareY * bounds.height));
    viewport.applyConstraints();
  }

  home() {
    this.#tell("lead");
    this.viewer.viewport.goHome();
  }

  native() {
    this.#tell("lead");
    const { viewport } = this.viewer;
    viewport.zoomTo(viewport.imageToViewportZoom(1 / (window.devicePixelRatio || 1)));
    viewport.applyConstraints();
  }

  /** Shows or hides the small map. */
  toggleMap() {
    const map = this.viewer.navigator.element.parentElement;
    map.hidden = !map.hidden;
  }

  /** Draws overlays and scale bar for what is seen now. */
  draw() {
    if (!this.viewer?.isOpen()) return;
    drawLayers(this.context, this.layers, this);
    const { mpp } = this.image;
    if (mpp === null) return;
    const umPerPx = mpp / this.place.zoom;
    const bar = roundLength(BAR_PX * umPerPx);
    this.element.querySelector(".bar").style.width = `${bar / umPerPx}px`;
    this.element.querySelector(".bar-text").textContent = length(bar);
  }

  /** Marks where the pointer is on the other image; null removes the mark. */
  mark(at) {
    const ghost = this.element.querySelector(".ghost");
    ghost.hidden = at === null;
    if (at === null) return;
    const { x, y } = this.toScreen(at.x, at.y);
    ghost.style.left = `${x}px`;
    ghost.style.top = `${y}px`;
  }

  #makeElement() {
    const { name, role, width, height, mpp, synthetic, facts, no_mpp: noMpp } = this.image;
    const pane = make("section", { className: "pane" });
    const caption = make("div", { className: "caption" });
    caption.append(make("strong", { textContent: name }));
    if (synthetic) {
      const recipe = Object.entries(facts).map(([key, value]) => `${key}: ${value}`).join("\n");
      caption.append(make("span", { className: "badge", textContent: "synthetic", title: recipe }));
    }
    if (role === "reference") caption.append(make("span", { textContent: "reference" }));
    const size = `${count(width)} × ${count(height)} px`;
    caption.append(make("span", { textContent: mpp === null ? size : `${size} at ${round(mpp)} µm` }));
    const stage = make("div", { className: "stage", tabIndex: 0 });
    stage.setAttribute("role", "application");
    stage.setAttribute("aria-roledescription", "zoomable image");
    const kind = synthetic ? "synthetic image" : role;
    stage.setAttribute("aria-label", `${name}, ${kind}: arrow keys move, plus and minus zoom`);
    const bar = make("div", { className: "scalebar" });
    bar.append(make("div", { className: "bar-text" }));
    if (mpp === null) {
      bar.querySelector(".bar-text").textContent = "no scale: the mpp is not known";
      bar.title = noMpp;
    } else {
      bar.append(make("div", { className: "bar" }));
    }
    stage.append(
      make("div", { className: "view" }),
      make("canvas", { className: "over" }),
      bar,
      make("div", { className: "ghost", hidden: true }),
    );
    pane.append(caption, stage);
    pane.setAttribute("aria-label", name);
    return pane;
  }
}

/** An element with its properties set. */
export function make(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

function round(mpp) {
  return String(Number(mpp.toPrecision(4)));
}
