// SPDX-License-Identifier: Apache-2.0
// Lengths and numbers as people read them.

const STEPS = [1, 2, 5];

/** The largest of 1, 2, 5, 10, ... that is at most `want`. */
export function roundLength(want) {
  const decade = 10 ** Math.floor(Math.log10(want));
  return Math.max(...STEPS.map((step) => step * decade).filter((l) => l <= want * 1.0001));
}

/** Micrometres with their unit. */
export function length(um) {
  if (Math.abs(um) >= 1e4) return `${trim(um / 1e3, 1)} mm`;
  if (um >= 1e3 && um % 1e3 === 0) return `${um / 1e3} mm`;
  return `${trim(um, Math.abs(um) >= 10 ? 1 : 3)} µm`;
}

/** A whole number with thin spaces between its thousands. */
export function count(value) {
  return String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, "\u2009");
}

function trim(value, digits) {
  return String(Number(value.toFixed(digits)));
}
