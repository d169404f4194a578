// The review page: shows one latent after the other, and sends what the reviewer says of it.
// "Saved" is shown only when the server has answered that the verdict is on its disk.
"use strict";

const token = document.querySelector('meta[name="cyto-token"]').content;
const KEYS = { meaningful: "m", not: "n", unsure: "u", a: "a", b: "b", neither: "n" };
const BLANK = { verdict: "", name: "", notes: "", confidence: null };
let review = null; // what the server sent: questions, verdicts by item
let question = null;
let at = 0;
const drafts = new Map(); // item -> what was entered and not saved: going back and forth loses nothing
let saving = false;
const saved = []; // what this page saved, the last one last: {question, item, before}, for undo
const times = []; // when, for the time that is left
const LONGEST = 300_000; // ms for one concept; longer is a break

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

function made(name, text = "", properties = {}) {
  const one = Object.assign(document.createElement(name), properties);
  one.textContent = text; // never as markup: names come from the data
  return one;
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
  $("question").append(...review.questions.map((each, number) => made("option", each.title, { value: number })));
  const open = review.questions.findIndex((each) => each.items.some(isOpen));
  choose(open < 0 ? 0 : open);
  say(Object.keys(review.verdicts).length ? "You go on where you stopped." : "Nothing has been judged under this name yet.");
});

$("question").addEventListener("change", () => choose(Number($("question").value)));

function choose(number) {
  $("question").value = number;
  question = review.questions[number];
  $("choices").replaceChildren(made("legend", "Verdict"), ...question.choices.map((value) => radio("choice", value, words(value), KEYS[value])));
  $("confidence").replaceChildren(
    made("legend", "How sure? (1 a guess, 5 certain)"),
    ...[1, 2, 3, 4, 5].map((value) => radio("sure", String(value), String(value), ""))
  );
  show(firstOpen(0) ?? 0);
}

function words(value) {
  const named = { a: `Specific to ${question.a}`, b: `Specific to ${question.b}`, neither: "Specific to neither" };
  return named[value] ?? { meaningful: "Meaningful", not: "Not meaningful", unsure: "Unsure" }[value];
}

function radio(group, value, text, key) {
  const label = made("label");
  const input = made("input", "", { type: "radio", name: group, value, id: `${group}-${value}` });
  label.append(input, ` ${text} `, ...(key ? [made("kbd", key)] : []));
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
  $("largest").textContent = item.largest.toPrecision(3);
  $("evidence").replaceChildren(...item.rows.flatMap((row) => [made("h3", row.title), images(row)]));
  const said = drafts.get(item.item) ?? review.verdicts[item.item] ?? BLANK;
  tick("choice", said.verdict);
  tick("sure", said.confidence);
  $("name").value = said.name;
  $("notes").value = said.notes;
  const judged = items.filter((each) => !isOpen(each)).length;
  Object.assign($("done"), { max: items.length, value: judged });
  $("counted").textContent = `${judged} of ${items.length}`;
  $("pace").textContent = pace(items.length - judged);
  $("undo").disabled = !saved.length;
  say(drafts.has(item.item) ? "Not saved yet." : "");
  complain("");
  $("title").focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

// About how long the rest takes, from the median of the verdicts of this visit; nothing before three.
function pace(left) {
  const steps = times.slice(1).map((time, n) => time - times[n]).filter((step) => step < LONGEST).sort((a, b) => a - b);
  if (steps.length < 3 || !left) return "";
  const minutes = (left * steps[Math.floor(steps.length / 2)]) / 60_000;
  return `about ${minutes < 1.5 ? "a minute" : `${Math.round(minutes)} minutes`} left`;
}

function tick(group, value) {
  for (const input of document.getElementsByName(group)) input.checked = input.value === String(value);
}

function images(row) {
  const list = made("ol", "", { className: row.is_range ? "images range" : "images" });
  row.images.forEach((image, number) => {
    const caption = image.label ?? "";
    const alt = `${row.is_range ? "Example" : "Reference image"} ${number + 1} of ${row.images.length}${caption && `: ${caption}`}`;
    const opens = made("button", "", { type: "button", ariaLabel: `${alt}, large` });
    opens.append(...pair(image, alt, row.is_range));
    opens.addEventListener("click", () => enlarge(row, number));
    const figure = made("figure");
    figure.append(opens);
    if (caption) figure.append(made("figcaption", caption));
    const entry = made("li");
    entry.append(figure);
    list.append(entry);
  });
  return list;
}

// The picture, and beside it the same with its map; of small examples the map alone, or the picture alone without maps.
function pair(image, alt, isSmall) {
  const both = made("span", "", { className: "pair-of" }), mapped = frame(image.src, "", "map");
  mapped.append(mapCanvas(CYTO.bytes(image.patches), 1));
  const plain = frame(image.src, alt, isSmall ? "plain" : "");
  both.append(plain, mapped);
  return [both];
}

function frame(src, alt, kind) {
  const one = made("span", "", { className: `frame ${kind} ${src === null ? "empty" : ""}` });
  one.append(src === null ? made("span", alt && "no picture") : made("img", "", { src, alt }));
  return one;
}

// ------------------------------------------------------------------------------------------------ one image, large

let large = null; // [row, number of the image]

function enlarge(row, number) {
  large = [row, number];
  const image = row.images[number];
  $("large-pair").replaceChildren(...pair(image, `Image ${number + 1} of ${row.images.length}`, false)[0].childNodes);
  $("large-caption").textContent = [row.title, `${number + 1} of ${row.images.length}`, image.label ?? ""].filter(Boolean).join(", ");
  $("large-before").disabled = number === 0;
  $("large-after").disabled = number + 1 === row.images.length;
  if (!$("large").open) $("large").showModal();
}

const turn = (step) => { if (large[0].images[large[1] + step]) enlarge(large[0], large[1] + step); };
$("large-before").addEventListener("click", () => turn(-1));
$("large-after").addEventListener("click", () => turn(1));
$("large-close").addEventListener("click", () => $("large").close());
$("large").addEventListener("click", (event) => { if (event.target === $("large")) $("large").close(); }); // beside it

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
  saved.push({ question, item, before: review.verdicts[item] ?? null });
  times.push(Date.now());
  review.verdicts[item] = said;
  drafts.delete(item);
  const next = firstOpen(at + 1);
  show(next ?? at);
  const others = review.questions.filter((each) => each !== question && each.items.some(isOpen)).map((each) => each.title);
  say(next !== null ? "Saved." : `Saved. All ${question.items.length} are judged.${others.length ? ` Still open: ${others.join(", ")}.` : " Thank you."}`);
});

// Takes back what was saved last: the verdict before it counts again, or none does. The journal keeps all of it.
async function undo() {
  const last = saved.at(-1);
  if (!last || saving) return;
  const undone = review.verdicts[last.item];
  wait(true);
  say("Taking back…");
  try {
    if (last.before) await post("reviews", { reviewer: review.reviewer, item: last.item, ...last.before });
    else await post("reviews/withdraw", { reviewer: review.reviewer, item: last.item });
  } catch (error) {
    say("");
    return complain(`Not taken back: ${error.message}`);
  } finally {
    wait(false);
  }
  saved.pop();
  times.pop();
  if (last.before) review.verdicts[last.item] = last.before;
  else delete review.verdicts[last.item];
  drafts.set(last.item, undone); // still in the form, to be changed
  if (last.question !== question) choose(review.questions.indexOf(last.question));
  show(question.items.findIndex((each) => each.item === last.item));
  say("Taken back; it is not saved any more.");
}

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
  z: () => undo(),
  p: () => {
    const hidden = document.body.classList.toggle("no-maps");
    $("with-maps").setAttribute("aria-pressed", String(!hidden));
  },
  Enter: () => $("verdict").requestSubmit(),
};
for (const [id, key] of [["back", "ArrowLeft"], ["forward", "ArrowRight"], ["next-open", "g"], ["with-maps", "p"], ["undo", "z"]]) {
  $(id).addEventListener("click", actions[key]);
}

document.addEventListener("keydown", (event) => {
  if (!question || saving) return;
  const target = event.target;
  if ($("large").open) { // a dialog: Escape closes it by itself
    const act = { ArrowLeft: () => turn(-1), ArrowRight: () => turn(1), p: actions.p }[event.key];
    if (act) { act(); event.preventDefault(); }
    return;
  }
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
