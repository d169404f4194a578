// The overview: which concepts are shown, in which order, what their cards say, and the plot beside them.
"use strict";

const MAPS_PER_FILE = 16; // as in gallery_files.py
const NEVER = 255;
const VERDICTS = ["not asked about", "not yet reviewed", "meaningful", "not meaningful", "unsure", "verdicts differ"]; // as in opinions.py
const OPEN_FIRST = { "not yet reviewed": 0, unsure: 1, "verdicts differ": 1, meaningful: 2, "not meaningful": 2, "not asked about": 4 };
const PLACES = ["", "middle", "border", "here and there", "all over", "same patch"]; // as in sentence.py
const ON = ["", "the nucleus", "the cell", "both", "the background", "one place"], TURN = [1, 0, 0, 1, 2, 3]; // as in lies_on.py
const CHIPS = { "on both": "cell and background", "named yes": "with a name" }; // of choices that an address calls otherwise
const DOUBTS = { // of cards, by what a concept lies on
  "one place": ["one place", "strongest at the same patch in most of its reference images: perhaps a place, and nothing in the cell"],
  "the background": ["background", "most of its strongest patches in its reference images show background, and no cell"],
};
const IS_DIFFERENT = 0.05; // q, as in gallery_files.py
const COLORED = 7; // labels with a colour of their own, in the plot and on the cards

function startGallery() {
  if ($("find")) Columns.read().then(openGallery);
}

function openGallery(data) {
  const form = $("find"), field = form.elements, { n } = data;
  // pair: the columns of a chosen comparison, by position; alike: position -> how many with the same cells are not shown
  const state = { box: null, pair: null, shown: [], alike: new Map() };
  const labelOf = (at) => (data.label && data.label[at] !== data.no_label ? data.label[at] : -1);
  const titleOf = (at) => data.name.get(at) ?? `Latent ${data.latents[at]}`;

  // ------------------------------------------------------------------------------------------- differences
  // Of the chosen comparison, or else of the one in which the concept differs most: [q, g, comparison]; null: not tested.
  function difference(at) {
    if (state.pair) return Number.isNaN(state.pair.q[at]) ? null : [state.pair.q[at], state.pair.g[at], state.pair.number];
    return !data.pair || data.pair[at] === NEVER ? null : [data.q[at], data.g[at], data.pair[at]];
  }

  function side(g, number) {
    const pair = data.pairs[number];
    if (pair.b === "all others") return `${g > 0 ? "higher" : "lower"} in ${pair.a}`;
    return `higher in ${g > 0 ? pair.a : pair.b}`;
  }

  function opponent(g, number) {
    const { a, b } = data.pairs[number];
    return b === "all others" || g > 0 ? b : a;
  }

  function higher(at) {
    if (!data.pair || data.pair[at] === NEVER || !(data.q[at] <= IS_DIFFERENT)) return "";
    return side(data.g[at], data.pair[at]);
  }

  // ------------------------------------------------------------------------------------------- chips
  const verdictOf = (at) => VERDICTS[data.verdict[at]];
  const byCount = (names) => ([a, x], [b, y]) => y - x || names.indexOf(a) - names.indexOf(b);
  const byText = ([a], [b]) => (a < b ? -1 : 1);
  const placeOf = (at) => (data.on && ON[data.on[at]] === "one place" ? "" : (PLACES[data.place?.[at]] ?? "")); // that is told by what it lies on
  const groups = [
    { name: "label", title: "Label", order: byCount(data.labels), of: (at) => data.labels[labelOf(at)] ?? "" },
    { name: "in", title: "Disease, any comparison", order: byText, hint: `q at most ${IS_DIFFERENT} in some comparison; a card says against whom`, of: higher },
    { name: "on", title: "Lies on", hint: "where its strongest patches are in its reference images; the cell: on it, but not mainly on its nucleus; one place: at the same patch of them, whatever is there", order: ([a], [b]) => ON.indexOf(a) - ON.indexOf(b), of: (at) => ON[data.on?.[at]] ?? "" },
    { name: "part", title: "Part", hint: "of the masks: what it marks best, and more than by chance", order: byCount(data.parts ?? []), of: (at) => data.parts?.[data.part?.[at]] ?? "" },
    { name: "place", title: "Where", hint: "in the image: at its middle or border, here and there, or all over", order: ([a], [b]) => PLACES.indexOf(a) - PLACES.indexOf(b), of: placeOf },
    { name: "dataset", title: "Dataset", order: byCount(data.datasets), of: (at) => data.datasets[data.dataset?.[at]] ?? "" },
    { name: "verdict", title: "Review", order: ([a], [b]) => VERDICTS.indexOf(a) - VERDICTS.indexOf(b), of: verdictOf },
    { name: "named", title: "Name", order: byText, of: (at) => (data.name.has(at) ? "yes" : "") },
  ];
  // The choices of a group among all concepts, with their numbers, in the order of its chips.
  function choicesOf({ name, order, of }) {
    if (data.counts) return data.counts.get(name) ?? [];
    const found = new Map();
    for (let at = 0; at < n; at++) found.set(of(at), (found.get(of(at)) ?? 0) + 1);
    if (name === "verdict" && (found.size === 1)) return [];
    found.delete("");
    if (name === "verdict") found.delete(VERDICTS[0]); // no chip: nobody asked
    return [...found].sort(order);
  }
  const countsOfAll = new Map(groups.map((group) => [group.name, new Map(choicesOf(group))]));
  for (const group of groups) group.values = [...countsOfAll.get(group.name).keys()].map((value) => [value, CHIPS[`${group.name} ${value}`] ?? value]);
  const common = [...countsOfAll.get("label").keys()].slice(0, COLORED).map((name) => data.labels.indexOf(name));
  const chips = new Chips($("chips"), groups.filter((group) => group.values.length), () => update());

  // ------------------------------------------------------------------------------------------- cards
  const mapsOn = () => $("maps").getAttribute("aria-pressed") === "true";
  const ready = new Map(); // file of maps -> its columns, when they are there

  async function showCardMap(shot, at) {
    const file = Math.floor(at / MAPS_PER_FILE);
    if (!ready.has(file)) {
      const found = await CYTO.load(`maps-${file}`);
      ready.set(file, { maps: CYTO.unpack(found.maps), aspect: CYTO.unpack(found.aspect) });
    }
    if (shot.dataset.at !== String(at) || !mapsOn() || shot.querySelector(".map")) return; // shows another one by now
    const { maps, aspect } = ready.get(file), size = maps.length / aspect.length, place = at % MAPS_PER_FILE;
    const steps = maps.subarray(place * size, (place + 1) * size), cover = steps.reduce((sum, step) => sum + step, 0) / (255 * size);
    const layer = element("span", { class: "map", "aria-hidden": "true" }, mapCanvas(steps, 1));
    layer.firstChild.style.opacity = 1 - 0.45 * cover; // a map that is everywhere must not hide its cell
    const wide = aspect[place], inset = (part) => `${50 - 50 * part}%`; // the picture lies in the middle of its square
    layer.style.inset = wide > 1 ? `${inset(1 / wide)} 0` : `0 ${inset(wide)}`;
    shot.querySelector(".first").append(layer);
  }

  // In how many images: a number if they are few (as in overview_pages.py), else their share.
  const nImages = Number($("cards").dataset.images), FEW = 10;
  function often(at) {
    const n = Math.round(data.frequency[at] * nImages);
    if (!data.frequency[at]) return "never active";
    return n < FEW ? `in ${n} image${n === 1 ? "" : "s"}` : `in ${share(data.frequency[at])} of images`;
  }

  function fill(card, at) {
    card.classList.toggle("coming", at < 0);
    if (at < 0) { // its row is not there yet
      card.querySelector(".shot").replaceChildren();
      delete card.querySelector(".shot").dataset.at;
      readAll();
      return;
    }
    const latent = data.latents[at], shot = card.querySelector(".shot"), link = card.querySelector("h2 a"), label = labelOf(at);
    shot.dataset.at = at;
    shot.replaceChildren(...(data.has_picture[at] ? [element("img", { src: `cards/${latent}.jpg`, alt: "", width: 288, height: 192, decoding: "async" }), element("span", { class: "first" })] : []));
    link.href = `concepts/${latent}.html`;
    link.textContent = titleOf(at);
    const more = state.alike.get(at);
    const of = card.querySelector(".of");
    of.textContent = [data.name.has(at) ? latent : "", more ? `${more} more alike` : ""].filter(Boolean).join(" ");
    of.classList.toggle("alike", !data.name.has(at));
    of.title = more ? `${more} more with the same cells` : "";
    const line = card.querySelector(".label");
    line.replaceChildren(...(label < 0 ? ["no label"] : [element("span", {}, `${data.share[at] < 0.5 ? "mixed, most often " : ""}${data.labels[label]}`), element("span", { class: "number" }, share(data.share[at]), element("span", { class: "of-what" }, " of its strongest"))]));
    const bar = card.querySelector(".bar rect");
    bar.setAttribute("width", label < 0 ? 0 : 100 * data.share[at]);
    bar.style.fill = COLORS[common.indexOf(label)] ?? GREY; // as in the plot
    const verdict = data.verdict[at] > 1 ? [element("span", { class: "tag" }, VERDICTS[data.verdict[at]])] : [];
    const [doubted, why] = DOUBTS[ON[data.on?.[at]]] ?? [], doubt = doubted ? [element("span", { class: "tag doubt", title: why }, doubted)] : [];
    card.querySelector(".often").replaceChildren(often(at), ...verdict, ...doubt);
    card.querySelector(".effect").textContent = data.pair ? effect(at) : "";
    if (mapsOn() && data.has_picture[at]) showCardMap(shot, at);
  }

  function effect(at) {
    const found = difference(at);
    if (!found) return "difference not tested";
    return found[0] <= IS_DIFFERENT ? `${side(found[1], found[2])} than in ${opponent(found[1], found[2])}, q\u00a0${short(found[0])}` : `no clear difference, q\u00a0${short(found[0])}`;
  }

  let asked = false; // for all columns
  function readAll() {
    if (asked || data.isWhole) return;
    asked = true;
    data.whole().then(update);
  }
  addEventListener("scroll", readAll, { passive: true, once: true });

  const shelf = new Shelf($("cards"), fill);
  document.addEventListener("maps", () => {
    for (const layer of document.querySelectorAll("#cards .map")) layer.remove();
    if (mapsOn()) for (const shot of document.querySelectorAll("#cards .shot")) if (shot.firstChild) showCardMap(shot, Number(shot.dataset.at));
  });

  // ------------------------------------------------------------------------------------------- order and filters
  const number = (name, otherwise) => (!field[name] || field[name].value === "" ? otherwise : Number(field[name].value));

  // Smaller first; NaN last.
  function keys() {
    const sort = field.sort.value;
    const of = {
      cells: (at) => (data.specificity ? (Number.isNaN(data.specificity[at]) ? 1 : -data.specificity[at] * data.mean[at]) : -data.mean[at]),
      specific: (at) => -data.specificity[at],
      mean: (at) => -data.mean[at],
      frequency: (at) => -data.frequency[at],
      mixed: (at) => data.specificity[at],
      open: (at) => OPEN_FIRST[verdictOf(at)],
      latent: (at) => at,
    }[sort] ?? ((at) => {
      const found = difference(at);
      return found ? found[0] - 1e-4 * Math.min(Math.abs(found[1]), 100) : NaN; // of one q the larger difference
    });
    return Float64Array.from({ length: n }, (_, at) => of(at));
  }

  function passesNumbers(at) {
    const ranges = [["frequency", data.frequency], ["mean", data.mean], ["share", data.share]];
    for (const [name, values] of ranges) {
      const [low, high] = [number(`${name}_min`, -Infinity), number(`${name}_max`, Infinity)];
      if ((low > -Infinity || high < Infinity) && !(values[at] >= low && values[at] <= high)) return false;
    }
    const most = number("q_max", Infinity);
    return most === Infinity || (difference(at)?.[0] ?? NaN) <= most;
  }

  function candidates() {
    const words = field.search.value.trim().toLowerCase(), isNumber = /^\d+$/.test(words), found = [];
    const labels = data.labels.map((name) => name.toLowerCase().includes(words));
    for (let at = 0; at < n; at++) {
      if (words) {
        const isNamed = data.name.get(at)?.toLowerCase().includes(words);
        if (!(isNumber ? String(data.latents[at]).startsWith(words) || isNamed : labels[labelOf(at)] || isNamed)) continue;
      }
      if (state.box) {
        const [x, y] = [Math.log10(data.frequency[at]), Math.log10(data.mean[at])], [left, right, bottom, top] = state.box;
        if (!(x >= left && x <= right && y >= bottom && y <= top)) continue;
      }
      if (passesNumbers(at)) found.push(at);
    }
    return found;
  }

  const fields = ["search", "sort", "frequency_min", "frequency_max", "mean_min", "mean_max", "share_min", "share_max", "q_max"].filter((name) => field[name]);
  const first = { sort: field.sort.options[0].value };

  // Nothing is chosen: what is seen first.
  const isAtRest = () => !state.box && !state.pair && folds() && !chips.any && fields.every((name) => field[name].value === (first[name] ?? ""));

  // What is seen first, of which the rows came first.
  function showFirst() {
    chips.draw(countsOfAll);
    state.shown = Array.from({ length: data.nDifferent }, (_, place) => data.first[place] ?? -1);
    state.alike = new Map([...data.first].map((at, place) => [at, data.alike[place]]));
    tell(n);
    plot?.draw();
  }

  function update() {
    if (data.isWhole) choose();
    else if (isAtRest()) showFirst();
    else readAll();
  }

  function choose() {
    const some = candidates(), order = keys(), turn = (at) => (field.sort.value === "cells" ? TURN[data.on?.[at] ?? 0] : 0);
    chips.draw(chips.count(some));
    state.shown = some.filter((at) => chips.passes(at)).sort((a, b) => {
      const [x, y] = [order[a], order[b]];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || data.mean[b] - data.mean[a] || a - b;
      return data.has_picture[b] - data.has_picture[a] || turn(a) - turn(b) || x - y || data.mean[b] - data.mean[a] || a - b;
    });
    if (field.sort.value === "cells") inTurn(turn);
    const all = state.shown.length;
    foldAlike();
    tell(all);
    if (plot) {
      plot.shown.fill(0);
      for (const at of some) if (chips.passes(at)) plot.shown[at] = 1;
      plot.boxed = state.box;
      plot.draw();
    }
  }

  // Of each label in turn the first concept, then the second, ...: as first_order of gallery_files.py.
  const labelPlaces = new Map([...countsOfAll.get("label").keys()].map((name, place) => [name, place]));
  function inTurn(turn) {
    const isUnknown = (at) => Number(data.specificity !== undefined && Number.isNaN(data.specificity[at]));
    const placeOf = (at) => labelPlaces.get(data.labels[labelOf(at)]) ?? labelPlaces.size;
    const seen = new Map(), rank = new Map();
    for (const at of state.shown) {
      const among = `${data.has_picture[at]},${turn(at)},${placeOf(at)}`, n = seen.get(among) ?? 0;
      rank.set(at, n);
      seen.set(among, n + 1);
    }
    state.shown.sort((a, b) => data.has_picture[b] - data.has_picture[a] || turn(a) - turn(b) || isUnknown(a) - isUnknown(b) || rank.get(a) - rank.get(b) || placeOf(a) - placeOf(b));
  }

  // Shows the cards, their number (of `all` that are chosen), and says in the address what is chosen.
  function tell(all) {
    $("count").textContent = state.shown.length === n ? `${whole(n)} concepts` : `${whole(state.shown.length)} of ${whole(n)} concepts${all > state.shown.length ? `; ${whole(all - state.shown.length)} more show the same cells` : ""}`;
    $("count").dataset.printed = state.shown.length > PRINTED ? `; the first ${PRINTED} are printed` : "";
    $("none").hidden = state.shown.length > 0;
    $("cards").hidden = !state.shown.length;
    if (state.shown.length) shelf.show(state.shown);
    const changes = Object.fromEntries(fields.map((name) => [name, field[name].value === first[name] ? "" : field[name].value]));
    for (const group of chips.groups) changes[group.name] = [...chips.pressed.get(group.name)].map(encodeURIComponent).join(",");
    changes.all = folds() ? "" : "1";
    changes.box = state.box ? state.box.map((place) => place.toPrecision(5)).join(",") : "";
    ADDRESS.write(changes);
    const pressed = [...chips.pressed.values()].reduce((sum, set) => sum + set.size, 0);
    $("filters").textContent = pressed ? `Filters, ${pressed} chosen: ${whole(state.shown.length)} of ${whole(n)}` : "Filters";
    $("clear").hidden = !Object.entries(changes).some(([name, value]) => name !== "sort" && value);
  }

  // Keeps the first of the concepts with the same cells; not of those that somebody searches for.
  const folds = () => $("fold").getAttribute("aria-pressed") === "true";
  function foldAlike() {
    state.alike.clear();
    if (!folds() || !data.cells || field.search.value.trim()) return;
    const firsts = new Map();
    state.shown = state.shown.filter((at) => {
      const first = firsts.get(data.cells[at]);
      if (first === undefined) firsts.set(data.cells[at], at);
      else state.alike.set(first, (state.alike.get(first) ?? 0) + 1);
      return first === undefined;
    });
  }

  async function choosePair() {
    const wanted = field.sort.value, number = wanted.startsWith("pair-") ? Number(wanted.slice(5)) : -1;
    if (number < 0) state.pair = null;
    else {
      const [found] = await Promise.all([CYTO.load(`pair-${data.pairs[number].file}`), data.whole()]), [q, g] = [CYTO.unpack(found.q), CYTO.unpack(found.hedges_g)];
      if (field.sort.value !== wanted) return; // chosen again meanwhile
      state.pair = { number, q: Float32Array.from(data.latents, (latent) => q[latent]), g: Float32Array.from(data.latents, (latent) => g[latent]) };
    }
    update();
  }

  // ------------------------------------------------------------------------------------------- the plot
  let plot = null;
  async function openPlot() {
    if (!$("side").open) return;
    await data.plot();
    if (plot) return;
    const [x, y] = [data.frequency, data.mean].map((values) => Float32Array.from(values, Math.log10));
    plot = new Scatter($("scatter"), {
      x, y, scales: [LOG, LOG], titles: ["share of images", "mean activation"],
      describe,
      open: (at) => data.whole().then(() => { location.href = `concepts/${data.latents[at]}.html`; }),
      choose: (box) => { state.box = box; update(); },
    });
    if (data.label) {
      plot.colors = [GREY, ...common.map((_, k) => COLORS[k])];
      plot.colorOf = Uint8Array.from({ length: n }, (_, at) => common.indexOf(labelOf(at)) + 1);
      showLegend(plot.canvas, [...common.map((code) => data.labels[code]), "other or none"], [...plot.colors.slice(1), GREY]);
    }
    update();
  }
  function describe(at) {
    if (!data.isWhole) return tipOf(null, [labelOf(at) < 0 ? "no label" : data.labels[labelOf(at)], often(at)]);
    const picture = data.has_picture[at] ? element("img", { src: `cards/${data.latents[at]}.jpg`, alt: "" }) : null;
    return tipOf(picture, [titleOf(at), labelOf(at) < 0 ? "no label" : `${data.labels[labelOf(at)]} ${share(data.share[at])}`, often(at)]);
  }
  $("side").addEventListener("toggle", openPlot);
  for (const kind of ["pointerenter", "focus"]) $("scatter").addEventListener(kind, readAll); // tips name and show
  for (const kind of ["pointerover", "focusin"]) {
    $("cards").addEventListener(kind, (event) => { const shot = event.target.closest("li")?.querySelector(".shot"); if (shot) plot?.mark(Number(shot.dataset.at)); });
  }
  $("cards").addEventListener("pointerleave", () => plot?.mark(-1));

  // ------------------------------------------------------------------------------------------- begin
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => (event.target === field.sort ? choosePair() : update()));
  const clear = () => { chips.clear(); $("fold").setAttribute("aria-pressed", "true"); state.box = null; state.pair = null; setTimeout(update); }; // the fields are not reset yet
  form.addEventListener("reset", clear);
  $("again").addEventListener("click", () => { form.reset(); });
  $("filters").addEventListener("click", () => $("filters").setAttribute("aria-expanded", String($("filters").getAttribute("aria-expanded") !== "true")));
  $("fold").addEventListener("click", () => { $("fold").setAttribute("aria-pressed", String(!folds())); update(); });

  function fromAddress() {
    const said = ADDRESS.read();
    for (const name of fields) if (said.has(name) || name !== "sort") field[name].value = said.get(name) ?? "";
    if (!said.has("sort") || field.sort.selectedIndex < 0) field.sort.value = first.sort;
    $("fold").setAttribute("aria-pressed", String(!said.has("all")));
    chips.clear();
    for (const group of chips.groups) for (const value of (said.get(group.name) ?? "").split(",").filter(Boolean)) chips.pressed.get(group.name).add(decodeURIComponent(value));
    const box = (said.get("box") ?? "").split(",").map(Number);
    state.box = box.length === 4 && box.every(Number.isFinite) ? box : null;
    choosePair();
  }
  addEventListener("hashchange", fromAddress);
  $("side").open = matchMedia("(min-width: 75rem)").matches;
  fromAddress();
}

document.addEventListener("DOMContentLoaded", startGallery);
