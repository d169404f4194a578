// The page of a pair of diseases: two plots of all latents, which choose the concepts whose cells are shown.
"use strict";

const MOST_CARDS = 60;

async function startPair() {
  const canvas = $("pair");
  if (!canvas) return;
  const built = await readBuilt(), data = await CYTO.load(`pair-${canvas.dataset.pair}`);
  const columns = Object.fromEntries(Object.entries(data).map(([name, column]) => [name, CYTO.unpack(column)]));
  const { mean_a: meanA, mean_b: meanB, difference, q, hedges_g: g, p } = columns, { a, b } = canvas.dataset;
  const rows = [...document.querySelectorAll("#beside .sides")], shown = new Set(rows.map((row) => Number(row.dataset.latent)));
  const state = { plot: "", box: null, side: "", clear: Boolean($("clear")) };

  const describe = (n) => tipOf(built.picture(n), [`latent ${n}`, `A ${short(meanA[n])}, B ${short(meanB[n])}`, `difference ${short(difference[n])}`, `q ${short(q[n])}`, ...(built.has(n) ? [] : ["no page"])]);
  const open = (n) => { if (built.has(n)) location.href = up(`concepts/${n}.html`); };
  const plots = {
    volcano: new Scatter($("volcano"), {
      x: g, y: Float32Array.from(p, (value) => -Math.log10(value)),
      scales: [PLAIN, PLAIN], titles: [`Hedges g, right: higher in ${a}`, "-log10 p"], describe, open, line: -Math.log10(Number($("volcano").dataset.p ?? NaN)), choose: (box) => choose("volcano", box),
    }),
    means: new Scatter(canvas, {
      x: Float32Array.from(meanB, Math.sqrt), y: Float32Array.from(meanA, Math.sqrt),
      scales: [ROOT, ROOT], titles: [`mean in B, ${b}`, `mean in A, ${a}`], diagonal: true, describe, open, choose: (box) => choose("means", box),
    }),
  };
  for (const plot of Object.values(plots)) {
    plot.colors = [GREY, COLORS[0], COLORS[5]];
    plot.colorOf = Uint8Array.from(q, (value, n) => (value <= 0.05 ? (difference[n] > 0 ? 1 : 2) : 0));
    showLegend(plot.canvas, ["q above 0.05, or not tested", `higher in ${a}, q at most 0.05`, `higher in ${b}, q at most 0.05`], plot.colors);
  }

  const inside = (n) => {
    if (!state.box) return true;
    const { x, y } = plots[state.plot], [left, right, bottom, top] = state.box;
    return x[n] >= left && x[n] <= right && y[n] >= bottom && y[n] <= top;
  };
  const onSide = (n) => !state.side || (state.side === "a" ? difference[n] > 0 : difference[n] < 0);

  const isClear = (n) => !state.clear || Boolean(state.box) || q[n] <= 0.05; // a box shows all that it holds

  function card(n) {
    const shot = element("span", { class: "shot" }), picture = built.picture(n);
    if (picture) shot.append(picture);
    const says = element("div", { class: "says" }, element("h3", {}, element("a", { href: up(`concepts/${n}.html`) }, String(n))),
      element("p", {}, `difference ${short(difference[n])}`), element("p", {}, `q ${short(q[n])}, A ${short(meanA[n])}, B ${short(meanB[n])}`));
    return element("li", {}, element("article", { class: "card" }, shot, says));
  }

  function show() {
    for (const row of rows) row.hidden = !(inside(Number(row.dataset.latent)) && onSide(Number(row.dataset.latent)) && isClear(Number(row.dataset.latent)));
    const chosen = [];
    for (let n = 0; n < g.length; n++) if (inside(n) && onSide(n) && isClear(n)) chosen.push(n);
    const others = state.box ? chosen.filter((n) => !shown.has(n)) : [];
    const cards = others.filter((n) => built.has(n)).sort((one, two) => Math.abs(difference[two]) - Math.abs(difference[one]) || one - two);
    $("others").replaceChildren(...cards.slice(0, MOST_CARDS).map(card));
    const n = rows.filter((row) => !row.hidden).length, without = others.length - cards.length;
    $("chosen").textContent = state.box
      ? `${whole(chosen.length)} latents in the box: ${n} with cells of both sides, ${whole(Math.min(cards.length, MOST_CARDS))} as cards${cards.length > MOST_CARDS ? ` (of ${whole(cards.length)}, the largest differences)` : ""}${without ? `, ${whole(without)} without a page` : ""}.`
      : `${n} latents${state.clear ? " with q of at most 0.05" : ""}; on both sides the strongest cell of three patients.${n || !state.clear ? "" : " The others are shown where “q of at most 0.05 only” is off."}`;
    $("everything").hidden = !state.box;
    for (const chip of document.querySelectorAll("[data-group=side]")) chip.setAttribute("aria-pressed", String(chip.dataset.value === state.side));
    $("clear")?.setAttribute("aria-pressed", String(state.clear));
    $("clear")?.closest("li").toggleAttribute("hidden", Boolean(state.box));
    const keep = state.box ? Uint8Array.from(g, (_, at) => (inside(at) ? 1 : 0)) : new Uint8Array(g.length).fill(1);
    for (const plot of Object.values(plots)) {
      plot.shown = keep;
      plot.draw();
    }
  }

  function choose(plot, box) {
    Object.assign(state, { plot: box ? plot : "", box });
    for (const [name, other] of Object.entries(plots)) if (name !== plot) other.boxed = null;
    ADDRESS.write({ box: box ? [plot, ...box.map((value) => Number(value.toPrecision(4)))].join(",") : "" });
    show();
  }

  document.addEventListener("click", (event) => {
    const chip = event.target.closest("[data-group=side]");
    if (!chip) return;
    state.side = chip.dataset.value;
    ADDRESS.write({ side: state.side });
    show();
  });
  $("clear")?.addEventListener("click", () => {
    state.clear = !state.clear;
    ADDRESS.write({ clear: state.clear ? "" : "0" });
    show();
  });
  $("everything").addEventListener("click", () => {
    for (const plot of Object.values(plots)) plot.boxed = null;
    choose(state.plot, null);
  });

  const said = ADDRESS.read(), [plot, ...numbers] = (said.get("box") ?? "").split(",");
  const box = numbers.map(Number);
  if (["a", "b"].includes(said.get("side"))) state.side = said.get("side");
  if (said.get("clear") === "0") state.clear = false;
  if (plots[plot] && box.length === 4 && box.every(Number.isFinite)) {
    plots[plot].boxed = box;
    Object.assign(state, { plot, box });
  }
  show();
}

document.addEventListener("DOMContentLoaded", startPair);
