// A list of very many cards of one height: only those in view, and a row above and below, are in the page.
"use strict";

const PRINTED = 48; // cards on paper, from the first

class Shelf {
  // `list`: a grid with one card, which is copied; `fill(card, n)` writes concept n into a copy.
  constructor(list, fill) {
    Object.assign(this, { list, fill, order: [], cards: new Map() });
    this.model = list.firstElementChild.cloneNode(true);
    const later = () => { this.waiting ??= requestAnimationFrame(() => { this.waiting = null; this.draw(); }); };
    addEventListener("scroll", later, { passive: true });
    addEventListener("resize", later);
    new ResizeObserver(() => { if (list.clientWidth && this.width !== list.clientWidth) { this.rowHeight = 0; later(); } }).observe(list);
    list.addEventListener("focusin", later);
    addEventListener("beforeprint", () => this.draw(PRINTED));
    addEventListener("afterprint", () => this.draw());
  }

  // Shows the concepts in this order, from the first. Cards in the page are filled anew, so that the focus stays.
  show(order) {
    this.order = order;
    if (!this.cards.size) this.list.replaceChildren();
    for (const [place, card] of [...this.cards]) {
      if (place < order.length) this.begin(card, place);
      else {
        card.remove();
        this.cards.delete(place);
      }
    }
    this.draw();
  }

  begin(card, place) {
    card.setAttribute("aria-posinset", place + 1);
    card.setAttribute("aria-setsize", this.order.length);
    this.fill(card, this.order[place]);
  }

  measure() {
    const probe = this.list.firstElementChild ?? this.list.appendChild(this.model.cloneNode(true)), style = getComputedStyle(this.list);
    if (!this.cards.size && this.order.length) this.fill(probe, this.order[0]);
    this.columns = style.gridTemplateColumns.split(" ").length;
    this.rowHeight = probe.offsetHeight + parseFloat(style.rowGap);
    this.width = this.list.clientWidth;
    if (!this.cards.size) this.list.replaceChildren();
  }

  draw(all = 0) {
    if (!this.rowHeight) this.measure();
    const { list, order, columns, rowHeight } = this, rows = Math.ceil(order.length / columns);
    const above = -list.getBoundingClientRect().top;
    const first = all ? 0 : Math.min(Math.max(Math.floor(above / rowHeight) - 1, 0), Math.max(rows - 1, 0));
    const last = all ? Math.ceil(all / columns) : Math.min(Math.max(Math.ceil((above + innerHeight) / rowHeight) + 1, first + 1), rows);
    const wanted = new Map();
    for (let place = first * columns; place < Math.min(last * columns, order.length); place++) {
      let card = this.cards.get(place);
      if (!card) {
        card = this.model.cloneNode(true);
        this.begin(card, place);
      }
      wanted.set(place, card);
    }
    for (const [place, card] of this.cards) if (!wanted.has(place)) card.remove();
    let before = null;
    for (const card of [...wanted.values()].reverse()) {
      if (card.parentElement !== list || card.nextElementSibling !== before) list.insertBefore(card, before);
      before = card;
    }
    this.cards = wanted;
    list.style.paddingTop = `${first * rowHeight}px`;
    list.style.paddingBottom = `${Math.max(rows - last, 0) * rowHeight}px`;
  }
}
