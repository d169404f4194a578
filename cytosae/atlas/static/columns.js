// The columns of the overview: of many concepts those of the first cards at once, the others when they are asked for.
"use strict";

class Columns {
  constructor(data) {
    const { n, largest, labels, no_label, datasets, parts, pairs } = data;
    Object.assign(this, { n, largest, labels, no_label, datasets, parts, pairs, isWhole: !data.at });
    this.name = new Map(data.names);
    this.first = data.at ? CYTO.unpack(data.at) : null; // rows that came first, in the first order
    this.take(data, this.first);
    this.n ??= this.latents.length;
    if (!this.first) return;
    this.counts = new Map(data.counts); // group of chips -> [[choice, concepts with it], ...]
    this.alike = CYTO.unpack(data.alike);
    this.nDifferent = data.n_different;
  }

  static async read() { return new Columns(await CYTO.load("gallery")); }

  // Takes columns of all rows, or of the rows `at`; share, g and mean as numbers.
  take(packed, at = null) {
    const scale = { mean: this.largest, share: 1 / 254, g: 1 / 100 };
    for (const [name, column] of Object.entries(packed)) {
      if (!column?.dtype || name === "at" || name === "alike") continue;
      let values = CYTO.unpack(column);
      if (name in scale) values = Float32Array.from(values, (value) => value * scale[name]);
      if (!at) this[name] = values;
      else {
        this[name] = new values.constructor(this.n);
        at.forEach((row, n) => { this[name][row] = values[n]; });
      }
    }
  }

  // Frequency, mean and label of all.
  plot() {
    if (this.isWhole) return Promise.resolve();
    this.plotted ??= CYTO.load("gallery-plot").then((found) => this.take(found));
    return this.plotted;
  }

  // Everything of all.
  whole() {
    if (this.isWhole) return Promise.resolve();
    this.coming ??= Promise.all([CYTO.load("gallery-rest"), this.plot()]).then(([found]) => {
      this.take(found);
      this.name = new Map(found.names);
      this.isWhole = true;
    });
    return this.coming;
  }
}
