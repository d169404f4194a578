// Chips that filter: groups of choices with counts. Within a group any of the pressed, across groups all.
"use strict";

class Chips {
  // `groups`: {name, title, hint, values: [[value, text], ...], of: position -> value}; `changed` is called after each press.
  constructor(root, groups, changed) {
    Object.assign(this, { root, groups, changed, pressed: new Map(groups.map((group) => [group.name, new Set()])), open: new Set() });
    root.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const { group, value } = button.dataset;
      if (value === undefined) {
        if (!this.open.delete(group)) this.open.add(group);
        this.draw(this.counts);
        this.root.querySelector(`[data-group="${group}"]:not([data-value])`).focus();
        return;
      }
      const set = this.pressed.get(group);
      if (!set.delete(value)) set.add(value);
      this.changed();
    });
  }

  // Does a position pass all groups, but perhaps the one that is left out (whose own counts are asked for)?
  passes(n, leftOut = null) {
    return this.groups.every((group) => group === leftOut || !this.pressed.get(group.name).size || this.pressed.get(group.name).has(String(group.of(n))));
  }

  get any() { return [...this.pressed.values()].some((set) => set.size); }

  clear() { for (const set of this.pressed.values()) set.clear(); }

  // For each group how many of the candidates (which pass everything else) have each value.
  count(candidates) {
    return new Map(this.groups.map((group) => {
      const found = new Map();
      for (const n of candidates) {
        if (!this.passes(n, group)) continue;
        const value = String(group.of(n));
        found.set(value, (found.get(value) ?? 0) + 1);
      }
      return [group.name, found];
    }));
  }

  begin(group) {
    const list = element("ul", { class: "chips", "data-of": group.name, "aria-label": group.title });
    this.root.append(element("div", { class: "chip-group" }, element("span", { class: "what", "aria-hidden": "true", title: group.hint ?? "" }, group.title), list));
    return list;
  }

  // Chips are drawn anew, but for those that stay, so that the focus stays.
  draw(counts) {
    this.counts = counts;
    const SHOWN = 8;
    for (const group of this.groups) {
      const pressed = this.pressed.get(group.name), of = counts.get(group.name), isOpen = this.open.has(group.name);
      const list = this.root.querySelector(`ul[data-of="${group.name}"]`) ?? this.begin(group);
      const wanted = group.values.map(([value, text]) => [String(value), text]).filter(([value], n) => isOpen || n < SHOWN || pressed.has(value));
      const there = new Map([...list.querySelectorAll("[data-value]")].map((chip) => [chip.dataset.value, chip.parentElement]));
      const items = wanted.map(([value, text]) => {
        const item = there.get(value) ?? element("li", {}, element("button", { type: "button", class: "chip", "data-group": group.name, "data-value": value }, text, " ", element("span", { class: "n" })));
        item.firstChild.setAttribute("aria-pressed", String(pressed.has(value)));
        item.querySelector(".n").textContent = whole(of.get(value) ?? 0);
        return item;
      });
      if (group.values.length > SHOWN) {
        const text = isOpen ? "fewer" : `${group.values.length - SHOWN} more`;
        items.push(element("li", {}, element("button", { type: "button", class: "chip quietly", "data-group": group.name, "aria-expanded": String(isOpen) }, text)));
      }
      const focused = list.contains(document.activeElement) ? document.activeElement : null;
      list.replaceChildren(...items);
      focused?.focus();
    }
  }
}
