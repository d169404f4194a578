// The page of a pair of diseases: the mean of each latent in A against that in B.
"use strict";

async function startPair() {
  const canvas = $("pair");
  if (!canvas) return;
  const built = await readBuilt(), data = await CYTO.load(`pair-${canvas.dataset.pair}`);
  const columns = Object.fromEntries(Object.entries(data).map(([name, column]) => [name, CYTO.unpack(column)]));
  const scatter = new Scatter(canvas, {
    x: Float32Array.from(columns.mean_b, Math.sqrt),
    y: Float32Array.from(columns.mean_a, Math.sqrt),
    scales: [ROOT, ROOT],
    titles: [`mean in B, ${canvas.dataset.b}`, `mean in A, ${canvas.dataset.a}`],
    diagonal: true,
    describe(n) {
      const lines = [`latent ${n}`, `A ${short(columns.mean_a[n])}, B ${short(columns.mean_b[n])}`, `difference ${short(columns.difference[n])}`, `q ${short(columns.q[n])}`, ...(built.has(n) ? [] : ["no page"])];
      return tipOf(built.picture(n), lines);
    },
    open: (n) => { if (built.has(n)) location.href = up(`concepts/${n}.html`); },
  });
  scatter.colors = [GREY, COLORS[0], COLORS[5]];
  scatter.colorOf = Uint8Array.from(columns.q, (q, n) => (q <= 0.05 ? (columns.difference[n] > 0 ? 1 : 2) : 0));
  showLegend(canvas, ["q above 0.05, or not tested", "higher in A, q at most 0.05", "higher in B, q at most 0.05"], scatter.colors);
  scatter.draw();
}

document.addEventListener("DOMContentLoaded", startPair);
