// Barcodes as stripes: a canvas of one row, a pixel per stripe, its opacity the value.
"use strict";

function startBarcodes() {
  for (const canvas of document.querySelectorAll(".stripes")) {
    const steps = CYTO.bytes(canvas.dataset.stripes), picture = new ImageData(steps.length, 1);
    steps.forEach((step, n) => picture.data.set([20, 34, 48, step], 4 * n));
    canvas.getContext("2d").putImageData(picture, 0, 0);
  }
}

document.addEventListener("DOMContentLoaded", startBarcodes);
