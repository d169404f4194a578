// The review page: shows one latent after the other, and sends what the reviewer says of it.
// "Saved" is shown only when the server has answered that the verdict is on its disk.
"use strict";

const $ = (id) => document.getElementById(id);
const token = document.querySelector('meta[name="cyto-token"]').content;
const KEYS = { meaningful: "m", not: "n", unsure: "u", a: "a", b: "b", neither: "n" };
const BLANK = { verdict: "", name: "", notes: "", confidence: null };
let review = null; // what the server sent: questions, verdicts by item
let question = null;
let at = 0;
const drafts = new Map(); // item -> what was entered and not saved: going back and forth loses nothing
let saving = false;

async function post(path, content) {
  const headers = { "Content-Type": "application/json", "X-Cyto-Token": token };
  let answer;
  try {
    answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(content) });
  } catch {
    throw new Error("the server does not answer; start cyto atlas serve again, then load this page again");
  }
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer.json();
}

function element(name, text = "", properties = {}) {
  const made = Object.assign(document.createElement(name), properties);
  made.textContent = text; // never innerHTML: names come from the data
  return made;
}

// ------------------------------------------------------------------------------------------------ begin, choose

$("begin").addEventListener("submit", async (event) => {
  event.preventDefault();
  say("");
  try {
    review = await post("reviews/begin", { reviewer: $("name-of-reviewer").value });
  } catch (error) {
    return complain(error.message);
  }
  review.questions = review.questions.filter((each) => each.items.length);
  if (!review.questions.length) {
    return complain("This atlas asks nothing: it was built without a selection (cyto concept select) and without comparisons.");
  }
  $("begin").hidden = true;
  for (const id of ["who", "asked", "progress", "review"]) $(id).hidden = false;
  $("atlas").hidden = !review.has_atlas;
  $("reviewer").textContent = review.reviewer;
  $("question").append(...review.questions.map((each, number) => element("option", each.title, { value: number })));
  const open = review.questions.findIndex((each) => each.items.some(isOpen));
  choose(open < 0 ? 0 : open);
  say(Object.keys(review.verdicts).length ? "You go on where you stopped." : "Nothing has been judged under this name yet.");
});

$("question").addEventListener("change", () => choose(Number($("question").value)));

function choose(number) {
  $("question").value = number;
  question = review.questions[number];
  $("choices").replaceChildren(element("legend", "Verdict"), ...question.choices.map((value) => radio("choice", value, words(value), KEYS[value])));
  $("confidence").replaceChildren(
    element("legend", "How sure? (1 a guess, 5 certain)"),
    ...[1, 2, 3, 4, 5].map((value) => radio("sure", String(value), "", String(value)))
  );
  show(firstOpen(0) ?? 0);
}

function words(value) {
  const named = { a: `Specific to ${question.a}`, b: `Specific to ${question.b}`, neither: "Specific to neither" };
  return named[value] ?? { meaningful: "Meaningful", not: "Not meaningful", unsure: "Unsure" }[value];
}

function radio(group, value, text, key) {
  const label = element("label");
  const input = element("input", "", { type: "radio", name: group, value, id: `${group}-${value}` });
  label.append(input, ` ${text} `, element("kbd", key));
  return label;
}

// ------------------------------------------------------------------------------------------------ show an item

const isOpen = (item) => !(item.item in review.verdicts);

function firstOpen(from) {
  const { items } = question;
  for (let step = 0; step < items.length; step++) {
    if (isOpen(items[(from + step) % items.length])) return (from + step) % items.length;
  }
  return null;
}

function show(number) {
  const { items } = question;
  at = number;
  const item = items[at];
  const latent = item.latent === null ? "" : `, latent ${item.latent}`;
  $("title").textContent = `Concept ${at + 1} of ${items.length}${latent}`;
  $("ask").textContent =
    question.question === "meaningful"
      ? "Is this a meaningful concept, and what is it?"
      : `Is what these images have in common specific to ${question.a} or to ${question.b}?`;
  $("facts").textContent = isOpen(item) ? "" : "Judged. Saving again replaces your verdict.";
  $("evidence").replaceChildren(scale(item.largest), ...item.rows.flatMap((row) => [element("h3", row.title), images(row)]));
  const said = drafts.get(item.item) ?? review.verdicts[item.item] ?? BLANK;
  tick("choice", said.verdict);
  tick("sure", said.confidence);
  $("name").value = said.name;
  $("notes").value = said.notes;
  const judged = items.filter((each) => !isOpen(each)).length;
  Object.assign($("done"), { max: items.length, value: judged });
  $("counted").textContent = `${judged} of ${items.length}`;
  say(drafts.has(item.item) ? "Not saved yet." : "");
  complain("");
  $("title").focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

function tick(group, value) {
  for (const input of document.getElementsByName(group)) input.checked = input.value === String(value);
}

function images(row) {
  const list = element("ol", "", { className: "images" });
  row.images.forEach((image, number) => {
    const caption = image.label ?? "";
    const alt = `Reference image ${number + 1} of ${row.images.length}${caption && `: ${caption}`}`;
    const overlaid = frame(image.src, "", "map");
    overlaid.append(map(image.patches));
    const pair = element("div", "", { className: "pair" });
    pair.append(frame(image.src, alt, ""), overlaid);
    const figure = element("figure");
    figure.append(pair);
    if (caption) figure.append(element("figcaption", caption));
    const entry = element("li");
    entry.append(figure);
    list.append(entry);
  });
  return list;
}

function frame(src, alt, kind) {
  const made = element("div", "", { className: `frame ${kind} ${src === null ? "empty" : ""}` });
  made.append(src === null ? element("span", alt && "no picture") : element("img", "", { src, alt }));
  return made;
}

// A map is a byte per patch. Colour and opacity follow the activation, as in the reference sheets.
function map(patches) {
  const bytes = Uint8Array.from(atob(patches), (letter) => letter.charCodeAt(0));
  const side = Math.round(Math.sqrt(bytes.length));
  return paint(side, side, bytes);
}

function paint(width, height, bytes) {
  const canvas = element("canvas", "", { width, height });
  canvas.setAttribute("aria-hidden", "true");
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  bytes.forEach((value, k) => pixels.data.set([...heat(value / 255), Math.round(value * 0.9)], 4 * k));
  context.putImageData(pixels, 0, 0);
  return canvas;
}

const HEAT = [[87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]]; // of inferno, without its darkest quarter

function heat(share) {
  const place = Math.min(share * 3, 2.999);
  const [below, above] = [HEAT[Math.floor(place)], HEAT[Math.floor(place) + 1]];
  return below.map((value, k) => value + (above[k] - value) * (place % 1));
}

function scale(largest) {
  const bar = element("p", "", { className: "scale" });
  bar.append("activation: 0", paint(256, 1, Uint8Array.from({ length: 256 }, (_, k) => k)), largest.toPrecision(3));
  return bar;
}

// ------------------------------------------------------------------------------------------------ enter, save

const entered = () => ({
  verdict: document.querySelector('input[name="choice"]:checked')?.value ?? "",
  confidence: Number(document.querySelector('input[name="sure"]:checked')?.value ?? 0) || null,
  name: $("name").value,
  notes: $("notes").value,
});

$("verdict").addEventListener("input", () => draft());

function draft() {
  drafts.set(question.items[at].item, entered());
  say("Not saved yet.");
}

$("verdict").addEventListener("submit", async (event) => {
  event.preventDefault();
  const { item } = question.items[at];
  const said = entered();
  if (!said.verdict) return complain("Choose a verdict first.");
  wait(true);
  say("Saving…");
  try {
    await post("reviews", { reviewer: review.reviewer, item, ...said });
  } catch (error) {
    say("");
    return complain(`Not saved: ${error.message}`);
  } finally {
    wait(false);
  }
  review.verdicts[item] = said;
  drafts.delete(item);
  const next = firstOpen(at + 1);
  show(next ?? at);
  const others = review.questions.filter((each) => each !== question && each.items.some(isOpen)).map((each) => each.title);
  say(next !== null ? "Saved." : `Saved. All ${question.items.length} are judged.${others.length ? ` Still open: ${others.join(", ")}.` : " Thank you."}`);
});

// Until the server has answered, nothing can be entered that its answer would then take for saved.
function wait(is) {
  saving = is;
  $("review").inert = $("question").disabled = is;
}

const go = (step) => show(Math.min(question.items.length - 1, Math.max(0, at + step)));
const actions = {
  ArrowLeft: () => go(-1),
  ArrowRight: () => go(1),
  g: () => show(firstOpen(at + 1) ?? at),
  w: () => $("name").focus(),
  o: () => $("notes").focus(),
  p: () => {
    const hidden = $("evidence").classList.toggle("no-maps");
    $("maps").setAttribute("aria-pressed", String(!hidden));
  },
  Enter: () => $("verdict").requestSubmit(),
};
for (const [id, key] of [["back", "ArrowLeft"], ["forward", "ArrowRight"], ["next-open", "g"], ["maps", "p"]]) {
  $(id).addEventListener("click", actions[key]);
}

document.addEventListener("keydown", (event) => {
  if (!question || saving) return;
  const target = event.target;
  const isText = target.matches('textarea, select, input:not([type="radio"])');
  if (isText && event.key === "Escape") $("title").focus();
  if (target.id === "notes" && event.key === "Enter" && (event.ctrlKey || event.metaKey)) actions.Enter();
  if (isText || event.ctrlKey || event.metaKey || event.altKey) return; // Enter in the name submits by itself
  if (target.matches('input[type="radio"]') && event.key.startsWith("Arrow")) return; // to the next choice
  if (target.matches("button, a") && ["Enter", " "].includes(event.key)) return; // they act by themselves
  const choice = question.choices.find((value) => KEYS[value] === event.key);
  const input = choice ? $(`choice-${choice}`) : $(`sure-${event.key}`);
  if (input) {
    input.checked = true;
    draft();
  } else if (event.key in actions) {
    actions[event.key]();
  } else {
    return;
  }
  event.preventDefault();
});

function say(text) {
  $("status").textContent = text;
}

function complain(text) {
  $("trouble").textContent = text;
}
