// SPDX-License-Identifier: Apache-2.0
// The page: builds panes and panel from what the server says, and binds buttons and keys.

import { Lock } from "./lock.js";
import { get, GridLayer, MaskLayer, SimilarityLayer } from "./overlay.js";
import { make, Pane } from "./pane.js";
import { addOverlay } from "./panel.js";
import { count, length } from "./units.js";

const $ = (id) => document.getElementById(id);
const LAYERS = { grid: GridLayer, similarity: SimilarityLayer };
const LAYOUTS = ["Show: both", "Show: first", "Show: second"];
const ZOOM = 1.5;
const STEP = 0.2; // of what is seen, for one press of an arrow key

const state = { panes: [], layers: [], lock: null, layout: 0, switches: {}, pointer: null };

start().catch((error) => notify(`The viewer could not start: ${error.message}`));

async function start() {
  const scene = await (await get("scene.json")).json();
  showTitle(scene.images);
  state.layers = [
    ...(scene.images.some((image) => image.mask) ? [new MaskLayer(scene.images)] : []),
    ...scene.cells.map((about) => new LAYERS[about.name](about)),
  ];
  state.panes = scene.images.map((image, index) => new Pane(image, index, state.layers));
  $("panes").append(...state.panes.map((pane) => pane.element));
  for (const pane of state.panes) {
    pane.on("failed", (_, why) => notify(`${pane.image.name}: a tile could not be shown (${why}).`));
  }
  await Promise.all(state.panes.map((pane) => pane.open()));
  if (state.panes.length === 2) lockPanes(scene.alignment);
  for (const pane of state.panes) {
    pane.on("move", () => showScale());
    pane.on("pointer", showPointer);
  }
  buildPanel(scene);
  bindButtons();
  showScale();
  const lost = scene.images.filter((image) => image.mpp === null);
  for (const image of lost) notify(`No scale for ${image.name}: ${image.no_mpp}.`);
  if (scene.alignment && !scene.alignment.certain) notify(`${sentence(scene.alignment.how)}.`);
  document.body.dataset.ready = "true";
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function showTitle(images) {
  const names = images.map((image) => image.name + (image.synthetic ? " (synthetic)" : ""));
  document.title = `${names.join(" beside ")} – ssldiff view`;
  $("title").replaceChildren(images[0].name);
  if (images.length === 2) {
    $("title").append(make("span", { className: "beside", textContent: " beside " }), images[1].name);
  }
  $("title").title = names.join(" beside ");
}

function lockPanes(alignment) {
  state.lock = new Lock(state.panes, alignment.region);
  $("lock").hidden = false;
  $("layout").hidden = false;
  $("lock").title = `Lock both views together (L); by ${alignment.how}`;
  state.lock.follow(state.panes[0]);
}

function buildPanel(scene) {
  for (const layer of state.layers) {
    state.switches[layer.name] = addOverlay($("panel"), layer, scene, redraw, notify);
  }
  if (!state.layers.length) togglePanel(false);
  if (window.matchMedia("(max-width: 760px)").matches) togglePanel(false);
}

function redraw() {
  for (const pane of state.panes) pane.draw();
  if (state.pointer) showPointer(...state.pointer);
}

function leader() {
  return state.lock ? state.lock.leader : state.panes[0];
}

function showScale() {
  const pane = leader();
  const { zoom } = pane.place;
  const { mpp } = pane.image;
  const share = `${Number((100 * zoom).toPrecision(3))} %`;
  $("scale").textContent = mpp === null ? share : `${share}, ${length(mpp / zoom)} per screen pixel`;
}

function showPointer(pane, at) {
  state.pointer = [pane, at];
  const inside = at && at.x >= 0 && at.y >= 0 && at.x < pane.image.width && at.y < pane.image.height;
  const locked = state.lock?.on && state.layout === 0;
  if (locked) state.lock.other(pane).mark(inside ? state.lock.across(pane, at) : null);
  if (!inside) {
    $("pointer").textContent = "";
    return;
  }
  const parts = [`x ${count(Math.floor(at.x))}, y ${count(Math.floor(at.y))} px`];
  const { mpp, name } = pane.image;
  if (mpp !== null) parts.unshift(`x ${length(at.x * mpp)}, y ${length(at.y * mpp)}`);
  if (state.panes.length === 2) parts.unshift(name);
  for (const layer of state.layers) {
    const value = layer.on && layer.valueAt(pane.index, at.x, at.y);
    if (value) parts.push(value);
  }
  $("pointer").textContent = parts.join("  ·  ");
}

function setLock() {
  if (!state.lock) return;
  state.lock.on = !state.lock.on;
  $("lock").setAttribute("aria-pressed", String(state.lock.on));
  $("lock").textContent = state.lock.on ? "Locked" : "Free";
  for (const pane of state.panes) pane.mark(null);
  state.lock.follow(state.lock.leader);
}

function setLayout() {
  if (state.panes.length < 2) return;
  const { place } = leader();
  const index = leader().index;
  state.layout = (state.layout + 1) % LAYOUTS.length;
  $("layout").textContent = LAYOUTS[state.layout];
  state.panes.forEach((pane, i) => {
    pane.element.hidden = state.layout !== 0 && state.layout !== i + 1;
    pane.mark(null);
  });
  // Once the page has given the panes their new sizes.
  requestAnimationFrame(() => requestAnimationFrame(() => {
    state.panes[index].place = place;
    state.lock.leader = state.panes[index];
    state.lock.follow(state.panes[index]);
  }));
}

function togglePanel(open = $("panel").hidden) {
  $("panel").hidden = !open;
  $("panel-toggle").setAttribute("aria-expanded", String(open));
}

function notify(text) {
  const notice = $("notice");
  if (notice.textContent.includes(text)) return;
  notice.textContent = notice.hidden ? text : `${notice.textContent} ${text}`;
  notice.hidden = false;
}

// key: [what it does, words of the help]; the first key of a row stands for all of them.
const KEYS = [
  [["+", "="], () => leader().zoomBy(ZOOM), "zoom in"],
  [["-", "_"], () => leader().zoomBy(1 / ZOOM), "zoom out"],
  [["ArrowLeft"], () => leader().panBy(-STEP, 0), "move left"],
  [["ArrowRight"], () => leader().panBy(STEP, 0), "move right"],
  [["ArrowUp"], () => leader().panBy(0, -STEP), "move up"],
  [["ArrowDown"], () => leader().panBy(0, STEP), "move down"],
  [["0", "Home"], () => leader().home(), "the whole image"],
  [["1"], () => leader().native(), "one image pixel to one screen pixel"],
  [["l"], setLock, "lock both views together, or free them"],
  [["v"], setLayout, "both images, the first, the second"],
  [["m"], () => state.switches.mask?.(), "tissue mask"],
  [["g"], () => state.switches.grid?.(), "grid cells"],
  [["s"], () => state.switches.similarity?.(), "similarity"],
  [["n"], () => state.panes.forEach((pane) => pane.toggleMap()), "small map of the whole image"],
  [["o"], () => togglePanel(), "list of overlays"],
  [["?", "h"], () => $("help").showModal(), "this help"],
];

function bindButtons() {
  $("zoom-in").onclick = () => leader().zoomBy(ZOOM);
  $("zoom-out").onclick = () => leader().zoomBy(1 / ZOOM);
  $("home").onclick = () => leader().home();
  $("native").onclick = () => leader().native();
  $("lock").onclick = setLock;
  $("layout").onclick = setLayout;
  $("panel-toggle").onclick = () => togglePanel();
  $("help-open").onclick = () => $("help").showModal();
  for (const [keys, , words] of KEYS) {
    const term = make("dt");
    term.append(make("kbd", { textContent: keys[0].replace("Arrow", "") }));
    $("shortcuts").append(term, make("dd", { textContent: words }));
  }
  document.addEventListener("keydown", onKey);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const typing = event.target.matches?.('input[type="range"]') && event.key.startsWith("Arrow");
  if (typing) return;
  const found = KEYS.find(([keys]) => keys.includes(event.key.length === 1 ? event.key.toLowerCase() : event.key));
  if (!found) return;
  event.preventDefault();
  found[1]();
}
