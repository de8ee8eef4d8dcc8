// SPDX-License-Identifier: Apache-2.0
// Two panes moving as one: the one last touched leads, the other shows the same place.

export class Lock {
  /**
   * @param {Pane[]} panes the image and its reference
   * @param {number[]} region where the image lies on the reference: x, y, width, height
   */
  constructor(panes, region) {
    const [image] = panes;
    this.panes = panes;
    this.offset = { x: region[0], y: region[1] };
    this.scale = { x: region[2] / image.image.width, y: region[3] / image.image.height };
    this.on = true;
    [this.leader] = panes;
    for (const pane of panes) {
      pane.on("lead", () => { this.leader = pane; });
      // One that was moved by something else, such as another size of the window, comes back.
      pane.on("move", () => this.follow(this.leader, pane));
    }
  }

  /** A position on one pane's image as the position on the other's. */
  across(pane, { x, y }) {
    if (pane === this.panes[0]) {
      return { x: this.offset.x + x * this.scale.x, y: this.offset.y + y * this.scale.y };
    }
    return { x: (x - this.offset.x) / this.scale.x, y: (y - this.offset.y) / this.scale.y };
  }

  other(pane) {
    return this.panes[0] === pane ? this.panes[1] : this.panes[0];
  }

  /** Moves the other pane to where the leader is, if `moved` has brought them apart. */
  follow(leader, moved = leader) {
    if (!this.on || leader !== this.leader) return;
    const { zoom, ...centre } = leader.place;
    const other = this.other(leader);
    const factor = leader === this.panes[0] ? 1 / this.scale.x : this.scale.x;
    const wanted = { ...this.across(leader, centre), zoom: zoom * factor };
    if (moved === leader || apart(other.place, wanted)) other.place = wanted;
  }
}

/** Whether two places differ by what is seen: half a screen pixel, or a thousandth of the zoom. */
function apart(one, other) {
  const distance = Math.hypot(one.x - other.x, one.y - other.y) * other.zoom;
  return distance > 0.5 || Math.abs(one.zoom / other.zoom - 1) > 1e-3;
}
