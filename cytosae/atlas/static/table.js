// The table of all latents, its filters, and the scatter above it.
"use strict";

async function readDataset(number) {
  const data = await CYTO.load(`latents-${number}`);
  const columns = { labels: data.labels };
  for (const name of ["frequency", "mean_activation", "max_activation", "label_entropy", "n_images", "top_label"]) columns[name] = CYTO.unpack(data[name]);
  return columns;
}

const PER_PAGE = 25;
const LABELS_WITH_COLOR = 7;

async function startLatents() {
  const form = $("filters");
  if (!form) return;
  if (matchMedia("(max-width: 48rem)").matches) $("more").open = false; // on a phone the points come first
  const built = await readBuilt(), field = form.elements;
  const state = { data: null, q: null, rows: [], page: 0, key: "mean_activation", falling: true };
  const body = $("latents").tBodies[0];
  let scatter = null;

  const number = (name, otherwise) => (field[name].value === "" ? otherwise : Number(field[name].value));

  function chosen() {
    const { data, q } = state, words = field.search.value.trim().toLowerCase(), isNumber = /^\d+$/.test(words);
    const label = field.label.value === "" ? -1 : Number(field.label.value);
    const found = words && !isNumber ? new Set(data.labels.flatMap((name, n) => (name.toLowerCase().includes(words) ? [n] : []))) : null;
    const ranges = [["frequency", data.frequency], ["mean", data.mean_activation], ["entropy", data.label_entropy]]
      .map(([name, values]) => [values, number(`${name}_min`, -Infinity), number(`${name}_max`, Infinity)])
      .filter(([, low, high]) => low > -Infinity || high < Infinity);
    const qMax = q ? number("q_max", Infinity) : Infinity;
    const shown = new Uint8Array(data.frequency.length);
    for (let n = 0; n < shown.length; n++) {
      shown[n] = (label < 0 || data.top_label[n] === label)
        && (!isNumber || String(n).startsWith(words))
        && (!found || found.has(data.top_label[n]))
        && ranges.every(([values, low, high]) => values[n] >= low && values[n] <= high)
        && (qMax === Infinity || q[n] <= qMax)
        && (!field.built.checked || built.has(n)) ? 1 : 0;
    }
    return shown;
  }

  function key(name) {
    const { data, q } = state;
    if (name === "latent") return (n) => n;
    if (name === "cluster") return built.cluster;
    if (name === "q") return (n) => (q ? q[n] : NaN);
    if (name === "label") { // labels are in order already, and those without one come last
      return (n) => (data.top_label[n] < data.labels.length ? data.top_label[n] : NaN);
    }
    return (n) => data[name][n];
  }

  function sort() {
    const of = key(state.key), sign = state.falling ? -1 : 1;
    const values = new Float64Array(state.data.frequency.length);
    for (const n of state.rows) values[n] = of(n);
    state.rows.sort((a, b) => {
      const [x, y] = [values[a], values[b]];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a - b; // undefined last
      return sign * (x - y) || a - b;
    });
    for (const heading of $("latents").tHead.rows[0].cells) {
      if (heading.dataset.key === state.key) heading.setAttribute("aria-sort", state.falling ? "descending" : "ascending");
      else heading.removeAttribute("aria-sort");
    }
  }

  function showPage() {
    const { data, q, rows } = state, last = Math.max(0, Math.ceil(rows.length / PER_PAGE) - 1);
    state.page = Math.min(Math.max(state.page, 0), last);
    const some = rows.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
    const isEmpty = { q: !q, cluster: !built.anyCluster, label: !data.labels.length, label_entropy: !data.labels.length };
    for (const heading of $("latents").tHead.rows[0].cells) heading.hidden = isEmpty[heading.dataset.key] ?? false;
    body.replaceChildren(...some.map((n) => element("tr", {},
      element("td", { class: "face-of" }, built.picture(n) ?? ""),
      element("th", { scope: "row" }, conceptLink(n, built.has(n))),
      ...[share(data.frequency[n]), short(data.mean_activation[n]), short(data.max_activation[n]), data.n_images[n].toLocaleString("en"), short(data.label_entropy[n]), data.labels[data.top_label[n]] ?? "–", short(built.cluster(n)), q ? short(q[n]) : "–"].map((text) => element("td", {}, text)))));
    const hidden = [...$("latents").tHead.rows[0].cells].map((heading) => heading.hidden);
    for (const row of body.rows) [...row.cells].forEach((cell, n) => { cell.hidden = hidden[n]; });
    $("page").textContent = `Page ${state.page + 1} of ${last + 1}`;
    $("before").disabled = state.page === 0;
    $("after").disabled = state.page === last;
  }

  function color() {
    if (!scatter) return;
    const { data } = state, by = $("colour").value;
    if (by === "label") {
      const counts = new Map();
      data.top_label.forEach((label) => { if (label < data.labels.length) counts.set(label, (counts.get(label) ?? 0) + 1); });
      const common = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || a - b).slice(0, LABELS_WITH_COLOR);
      scatter.colors = [GREY, ...common.map((_, n) => COLORS[n])];
      scatter.colorOf = Uint8Array.from(data.top_label, (label) => common.indexOf(label) + 1);
      showLegend(scatter.canvas, [counts.size > common.length ? "other or none" : "none", ...common.map((label) => data.labels[label])], scatter.colors);
    } else if (by === "entropy") {
      const known = [...data.label_entropy].filter((value) => !Number.isNaN(value)), most = Math.max(...known, 1e-9);
      const steps = ["#fde725", "#5ec962", "#21918c", "#3b528b", "#440154"];
      scatter.colors = [GREY, ...steps];
      scatter.colorOf = Uint8Array.from(data.label_entropy, (value) => (Number.isNaN(value) ? 0 : 1 + Math.min(Math.floor((value / most) * steps.length), steps.length - 1)));
      showLegend(scatter.canvas, ["none", ...steps.map((_, n) => `${short((n * most) / steps.length)} to ${short(((n + 1) * most) / steps.length)}`)], scatter.colors);
    } else {
      scatter.colors = [GREY, COLORS[5]];
      scatter.colorOf = Uint8Array.from(data.frequency, (_, n) => (built.has(n) ? 1 : 0));
      showLegend(scatter.canvas, ["no page", "has a page"], scatter.colors);
    }
    scatter.draw();
  }

  function update() {
    const shown = chosen();
    state.rows = [];
    shown.forEach((is, n) => { if (is) state.rows.push(n); });
    state.page = 0;
    sort();
    showPage();
    let silent = 0;
    for (const n of state.rows) silent += state.data.frequency[n] === 0;
    const unseen = scatter && silent ? `; ${silent.toLocaleString("en")} of them are never active and not in the scatter` : "";
    $("count").textContent = `${state.rows.length.toLocaleString("en")} of ${shown.length.toLocaleString("en")} latents${unseen}`;
    if (scatter) {
      scatter.shown = shown;
      scatter.draw();
    }
  }

  function describe(n) {
    const { data, q } = state, lines = [`latent ${n}`, `frequency ${short(data.frequency[n])}`, `mean activation ${short(data.mean_activation[n])}`, data.labels[data.top_label[n]] ?? "no label"];
    if (q) lines.push(`q ${short(q[n])}`);
    if (!built.has(n)) lines.push("no page");
    return tipOf(built.picture(n), lines);
  }

  async function changeDataset() {
    $("latents").ariaBusy = "true";
    const wanted = field.dataset.value, data = await readDataset(wanted);
    if (wanted !== field.dataset.value) return; // changed again meanwhile
    state.data = data;
    field.label.replaceChildren(element("option", { value: "" }, "any"), ...state.data.labels.map((name, n) => element("option", { value: n }, name)));
    if ($("scatter")) {
      const [x, y] = [state.data.frequency, state.data.mean_activation].map((values) => Float32Array.from(values, Math.log10));
      if (!scatter) {
        scatter = new Scatter($("scatter"), { x, y, scales: [LOG, LOG], titles: ["frequency", "mean activation"], describe, open: (n) => { if (built.has(n)) location.href = up(`concepts/${n}.html`); } });
      } else {
        scatter.set(x, y);
      }
      color();
    }
    update();
    $("latents").ariaBusy = "false";
  }

  async function changePair() {
    const pair = field.pair.value;
    const q = pair ? CYTO.unpack((await CYTO.load(`pair-${pair}`)).q) : null;
    if (pair !== field.pair.value) return;
    state.q = q;
    update();
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target === field.dataset) changeDataset();
    else if (event.target === field.pair) changePair();
    else update();
  });
  form.addEventListener("reset", () => setTimeout(() => { state.q = null; changeDataset(); })); // its fields are not reset yet
  $("latents").tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("th");
    if (!heading) return;
    state.falling = heading.dataset.key === state.key ? !state.falling : ["frequency", "mean_activation", "max_activation", "n_images"].includes(heading.dataset.key);
    state.key = heading.dataset.key;
    state.page = 0;
    sort();
    showPage();
  });
  $("before").addEventListener("click", () => { state.page -= 1; showPage(); });
  $("after").addEventListener("click", () => { state.page += 1; showPage(); });
  $("colour")?.addEventListener("input", color);
  const said = ADDRESS.read(); // a link from the page of a comparison: its latents, the smallest q first
  if (field.pair && [...field.pair.options].some((one) => one.value === said.get("pair"))) {
    field.pair.value = said.get("pair");
    if (Number(said.get("q_max")) > 0) field.q_max.value = Number(said.get("q_max"));
    Object.assign(state, { key: "q", falling: false });
  }
  await changeDataset();
  if (field.pair?.value) await changePair();
}

document.addEventListener("DOMContentLoaded", startLatents);
