"use strict";
// Shows what `ultramem_jax.inspection.pages` has put into the page. All text becomes text nodes, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") for (const [key, of] of Object.entries(value)) node.style.setProperty(key, of);
      else if (value === true) node.setAttribute(name, "");
      else if (value !== false && value != null) node.setAttribute(name, value);
    }
    node.append(...children.flat(Infinity).filter((child) => child != null));
    return node;
  }

  const whole = (n) => Math.round(n).toLocaleString("en-US");
  const tiny = (x) => String(Number(x.toPrecision(2)));
  const plain = (x) => (x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x >= 0.1 || x === 0 ? x.toFixed(2) : tiny(x));
  // What is not finite is null in the data.
  const short = (x) => x == null ? "not finite" : (x < 0 ? "−" : "") + plain(Math.abs(x));
  const signed = (x) => x == null ? "not finite" : (x > 0 ? "+" : x < 0 ? "−" : "±") + (Math.abs(x) >= 0.1 ? Math.abs(x).toFixed(3) : tiny(Math.abs(x)));
  const percent = (x) => (100 * x).toFixed(x > 0 && x < 0.1 ? 2 : 1) + " %";
  const nats = (x) => (x == null ? null : x / data.knock_unit);
  const largest = (numbers) => numbers.reduce((most, x) => Math.max(most, Math.abs(x)), 0) || 1;
  const nothing = Object.freeze({});

  const names = Object.keys(data.memories);
  const state = { tab: "text", token: 0, memory: names[0], head: 0, table: null, slot: null, colour: data.knocked ? "given" : "loss", shown: null };

  // ---- what a state shows

  const memory = () => data.memories[state.memory];
  const table = (name) => data.tables[name];
  const card = (name, slot) => (table(name).cards || nothing)[slot];
  const weighs = (name) => names.some((one) => data.memories[one].table === name && data.memories[one].weighs);
  const reads = (name, token, head) => data.memories[name].reads[token][head] || [];
  const tableShown = () => state.shown || memory().table;

  /** Returns [token -> strongest score] of a slot over all memories that read its table. */
  function scoresOf(name, slot) {
    const found = new Map();
    const add = (at, token, score) => {
      if (at === slot && Math.abs(score) >= Math.abs(found.get(token) ?? 0)) found.set(token, score);
    };
    for (const one of names) {
      if (data.memories[one].table !== name) continue;
      data.memories[one].reads.forEach((heads, token) => heads.forEach((list) => list.forEach(([at, score]) => add(at, token, score))));
      data.memories[one].weaker.forEach(([at, token, score]) => add(at, token, score));
    }
    return found;
  }

  function says(one) {
    return one && one.up && one.up.length ? one.up.slice(0, 5).map(([token]) => token) : [];
  }

  // ---- changes of the state

  function change(changes, focus) {
    Object.assign(state, changes);
    if (state.slot != null && state.table == null) state.table = memory().table;
    if (!available(state.colour)) state.colour = "loss";
    render();
    remember();
    if (focus) document.querySelector(focus)?.focus({ preventScroll: false });
  }

  function chooseToken(token, focus) {
    change({ token, ...firstSlot(token) }, focus ? `#tokens button[data-token="${token}"]` : null);
  }

  /** Returns the slot that a token reads most strongly among those that were looked into. */
  function firstSlot(token) {
    const of = memory().table, list = reads(state.memory, token, state.head);
    const kept = list.some(([slot]) => slot === state.slot && state.table === of);
    if (kept) return {};
    const found = list.find(([slot]) => card(of, slot)) || list[0];
    return found ? { table: of, slot: found[0] } : {};
  }

  function available(colour) {
    if (colour === "knock") return state.slot != null && !!(card(state.table, state.slot) || nothing).knock;
    if (colour === "given") return !!data.knocked;
    return colour === "loss" || state.slot != null;
  }

  function remember() {
    const { tab, token, memory, head, table, slot, colour, shown } = state;
    const parts = Object.entries({ tab, token, memory, head, table, slot, colour, shown }).filter(([, value]) => value != null);
    try {
      history.replaceState(null, "", "#" + new URLSearchParams(parts));
    } catch { /* a frame without an address of its own */ }
  }

  /** Takes the state from the address, as far as this page has what it names. */
  function recall() {
    const given = new URLSearchParams(location.hash.slice(1)), number = (key) => Number.parseInt(given.get(key), 10);
    // The token that surprises the model most, once it has read a few.
    const from = Math.min(4, data.tokens.length - 1);
    state.token = data.tokens.reduce((best, token, i) => (i > from && token.loss > (data.tokens[best].loss ?? -1) ? i : best), from);
    if (["text", "tables"].includes(given.get("tab"))) state.tab = given.get("tab");
    if (Object.hasOwn(data.memories, given.get("memory"))) state.memory = given.get("memory");
    if (number("token") >= 0 && number("token") < data.tokens.length) state.token = number("token");
    if (number("head") >= 0 && number("head") < memory().heads.length) state.head = number("head");
    const knows = (key) => Object.hasOwn(data.tables, given.get(key));
    if (knows("shown")) state.shown = given.get("shown");
    if (knows("table") && number("slot") >= 0 && number("slot") < table(given.get("table")).slots) Object.assign(state, { table: given.get("table"), slot: number("slot") });
    else Object.assign(state, firstSlot(state.token));
    if (available(given.get("colour")) && ["loss", "slot", "knock", "given"].includes(given.get("colour"))) state.colour = given.get("colour");
  }

  // ---- drawing

  function choice(id, options, chosen, pick) {
    $(id).replaceChildren(...(options.length > 1 ? options : []).map(([value, label, on = true]) =>
      el("button", { "aria-pressed": String(value === chosen), disabled: !on, onclick: () => { pick(value); $(id).querySelector("[aria-pressed=true]")?.focus(); } }, label)));
  }

  function drawControls() {
    choice("choose-memory", names.map((name) => [name, name]), state.memory, (name) =>
      { state.memory = name; state.head = Math.min(state.head, memory().heads.length - 1); change(firstSlot(state.token)); });
    choice("choose-head", memory().heads.map((name, i) => [i, name]), state.head, (head) =>
      { state.head = head; change(firstSlot(state.token)); });
    const weight = memory().weighs ? "Weight of the slot" : "Readers of the slot";
    const colours = [["loss", "Loss"], ["slot", weight, available("slot")], ["knock", "Loss without the slot", available("knock")]];
    if (data.knocked) colours.push(["given", "Knock-out"]);
    choice("choose-colour", colours, state.colour, (colour) => change({ colour }));
    choice("choose-table", Object.keys(data.tables).map((name) => [name, name]), tableShown(), (shown) => change({ shown }));
    for (const tab of ["text", "tables"]) {
      $("tab-" + tab).setAttribute("aria-selected", String(state.tab === tab));
      $("tab-" + tab).tabIndex = state.tab === tab ? 0 : -1;
      $("view-" + tab).hidden = state.tab !== tab;
    }
  }

  /** Returns the number that colours each token, or null, with the range of its scale. */
  function colouring() {
    if (state.colour === "slot") {
      const scores = scoresOf(state.table, state.slot);
      const signs = weighs(state.table);
      const values = data.tokens.map((_, i) => (scores.has(i) ? (signs ? scores.get(i) : 1) : null));
      return { values, most: largest(values.filter((x) => x != null)), signs, up: "--up", down: "--down", unit: signs ? "weight" : "" };
    }
    if (state.colour === "knock" || state.colour === "given") {
      const values = state.colour === "given" ? data.knocked.map(nats) : card(state.table, state.slot).knock.map(nats);
      return { values, most: largest(values.filter((x) => x != null)), signs: true, up: "--heat", down: "--good", unit: "nats" };
    }
    const values = data.tokens.map((token) => token.loss);
    const sorted = values.filter((x) => x != null).sort((a, b) => a - b);
    return { values, most: sorted[Math.floor(0.97 * (sorted.length - 1))] || 1, signs: false, up: "--heat", unit: "nats" };
  }

  function drawTokens() {
    const { values, most, signs, up, down, unit } = colouring();
    const readers = state.slot == null ? new Map() : scoresOf(state.table, state.slot);
    [...$("tokens").querySelectorAll("button")].forEach((button, i) => {
      const value = values[i];
      const share = value == null ? 0 : Math.min(Math.abs(value) / most, 1);
      button.style.setProperty("--share", (82 * share).toFixed(1));
      button.style.setProperty("--tint", `var(${value < 0 ? down : up})`);
      button.setAttribute("aria-pressed", String(i === state.token));
      button.tabIndex = i === state.token ? 0 : -1;
      button.classList.toggle("reader", readers.has(i));
      const loss = data.tokens[i].loss;
      const told = i === 0 ? "starts the text" : loss == null ? "loss not finite" : `loss ${short(loss)} nats`;
      button.title = told + (state.colour !== "loss" && value != null && unit ? `; ${unit} ${signs ? signed(value) : short(value)}` : "");
    });
    const scale = signs ? `var(${down}), var(--sunk), var(${up})` : `var(--sunk), var(${up})`;
    const ends = unit ? [signs ? `−${short(most)}` : "0", `${signs ? "+" : ""}${short(most)} ${unit}`] : null;
    $("legend").replaceChildren(...(ends
      ? [ends[0], el("i", { style: { background: `linear-gradient(90deg, ${scale})` } }), ends[1]]
      : []));
  }

  function bar(share, negative, colour) {
    const width = Math.max(100 * Math.min(Math.abs(share), 1), share === 0 ? 0 : 1.5).toFixed(1) + "%";
    return el("div", { class: "bar" }, el("i", { class: negative ? "negative" : null, style: { width, ...(colour ? { background: `var(${colour})` } : {}) } }));
  }

  function entry(i, name, slot, value, share, plain, block, weights) {
    const one = card(name, slot), chosen = state.table === name && state.slot === slot;
    const words = says(one);
    return el("button", {
      class: one ? "read" : "read plain", "data-slot": slot, "aria-pressed": String(chosen), tabindex: "-1",
      // By its place: a token may read a slot twice, in two blocks.
      onclick: () => change({ table: name, slot }, `#list button:nth-child(${i + 1})`),
    },
    el("span", { class: "slot" }, whole(slot)),
    bar(share, share < 0, plain ? "--accent" : null), el("span", { class: "value" }, value),
    block == null ? null : el("span", { class: "block" }, `block ${block}`),
    words.length || weights || block != null ? el("span", { class: "says" }, words.flatMap((word) => [el("span", { class: "tok" }, word), " "])) : null,
    weights ? el("span", { class: "vector" }, weights.map(short).join(" · ")) : null);
  }

  function drawList() {
    let entries;
    if (state.tab === "text") {
      const list = reads(state.memory, state.token, state.head), of = memory(), most = largest(list.map(([, score]) => score));
      $("list-title").replaceChildren("Slots that ", el("span", { class: "tok" }, data.tokens[state.token].text), " reads");
      const cut = of.cut ? `, the ${list.length} strongest of ${of.per_head}` : "";
      $("list-note").textContent = `${state.memory}${of.heads[state.head] ? ", " + of.heads[state.head] : ""}${cut}. Bars show the ${of.measure}; below, what each slot promotes.`;
      entries = list.map(([slot, score, block, weights], i) =>
        entry(i, of.table, slot, short(score), score / most, false, block, weights));
    } else {
      const of = table(tableShown()), list = of.usage ? of.usage.most : [];
      $("list-title").textContent = "Most read slots";
      $("list-note").textContent = of.usage ? `of ${tableShown()}, in ${data.corpus.name}` : "No corpus was read.";
      entries = list.map(([slot, count], i) => entry(i, tableShown(), slot, whole(count), count / list[0][1], true));
    }
    $("list").replaceChildren(...entries);
    const first = $("list").querySelector("[aria-pressed=true]") || $("list").firstElementChild;
    if (first) first.tabIndex = 0;
  }

  // ---- the card of a slot

  /** Tells a screen reader in a line what has changed. */
  function say(words) {
    if ($("said").textContent !== words) $("said").textContent = words;
  }

  function part(title, wide, ...children) {
    return el("div", { class: wide ? "wide" : null }, el("h3", {}, title), children);
  }

  function drawCard() {
    if (state.slot == null) {
      $("card").replaceChildren(el("p", { class: "note" }, "Choose a token, then one of the slots that it reads."));
      return;
    }
    const name = state.table, slot = state.slot, one = card(name, slot), of = table(name), scores = scoresOf(name, slot);
    const facts = [];
    const count = one ? one.count : (of.counts || nothing)[slot];
    if (data.corpus && count != null) facts.push(["read ", el("b", {}, whole(count) + "×"), ` in ${whole(data.corpus.tokens)} tokens`]);
    if (one && one.rank) facts.push(["rank ", el("b", {}, whole(one.rank)), ` of ${whole(of.slots)}`]);
    facts.push([el("b", {}, whole(scores.size)), ` of ${whole(data.tokens.length)} tokens here`]);
    if (one && one.block != null && of.blocks > 1) facts.push(["block ", el("b", {}, String(one.block))]);
    if (one && one.weight !== undefined) facts.push(["read with ", el("b", {}, short(one.weight)), ` by ${one.memory}`]);
    const parts = one ? [...promotion(one), ...contexts(name, one), ...effect(one), ...ngrams(one), ...nearest(name, one)] : [];
    say(`Slot ${slot} of ${name}` + (says(one).length ? `, promotes ${says(one).join(", ")}` : ""));
    $("card").replaceChildren(
      el("div", { class: "head" }, el("h2", {}, "Slot ", el("span", { class: "slot" }, whole(slot))), el("span", { class: "note" }, name)),
      el("ul", { class: "facts" }, facts.map((fact) => el("li", {}, fact))),
      one ? el("div", { class: "parts" }, parts)
        : el("p", { class: "note" }, "This slot was not looked into: the page has cards of the strongest reads of the text's tokens. --cards makes it more."));
  }

  function promotion(one) {
    if (one.up === null) return [part("Promotes", true, el("p", { class: "note" }, "The row is not finite."))];
    if (!one.up) return [];
    const list = (entries, negative) => {
      const most = largest([...one.up, ...one.down].map(([, score]) => score));
      return el("div", { class: "scores" }, entries.map(([token, score]) =>
        el("div", {}, el("span", { class: "tok" }, token), bar(score / most, negative))));
    };
    return [part("Promotes", false, list(one.up, false)), part("Suppresses", false, list(one.down, true))];
  }

  function contexts(name, one) {
    if (!one.contexts || !one.contexts.length) return data.corpus ? [part("Contexts", true, el("p", { class: "note" }, "No token of the corpus reads it."))] : [];
    return [part(weighs(name) ? "Strongest in the corpus" : "First in the corpus", true, el("div", { class: "contexts" }, one.contexts.map(([before, token, after, score]) =>
      el("div", { class: "context" }, el("span", { class: "before" }, el("bdi", {}, before + "\u200e")), el("mark", {}, token),
        el("span", { class: "after" }, el("bdi", {}, after)), el("span", { class: "value" }, weighs(name) ? short(score) : "")))))];
  }

  function effect(one) {
    if (!one.knock) return [];
    const values = one.knock.map(nats), most = largest(values.filter((x) => x != null)), width = 600, height = 80, step = width / values.length;
    const bars = values.map((value, i) => {
      const tall = value == null ? 0 : Math.max((Math.abs(value) / most) * (height / 2 - 3), value === 0 ? 0 : 1);
      return svg("g", { onclick: () => chooseToken(i, true) },
        svg("title", {}, `${data.tokens[i].text} ${i ? signed(value) : ""}`),
        svg("rect", { x: i * step, y: 0, width: step, height, fill: i === state.token ? "var(--sunk)" : "transparent" }),
        svg("rect", { x: i * step + step * 0.12, width: Math.max(step * 0.76, 0.5), y: value > 0 ? height / 2 - tall : height / 2, height: tall, rx: 1,
          fill: value > 0 ? "var(--heat)" : "var(--good)" }));
    });
    const worst = values.reduce((best, value, i) => ((value ?? 0) > (values[best] ?? 0) ? i : best), 0);
    const told = values[worst] > 0 ? [", most of all for ", el("span", { class: "tok" }, data.tokens[worst].text), ` (${signed(values[worst])})`] : [];
    return [part("Without it", true,
      el("div", { class: "note" }, el("span", { class: "big" }, signed(one.effect)), " nats per token of this text", told),
      svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", class: "loss-bars", role: "img", "aria-label": "Change of the loss of each token without the slot" },
        bars, svg("line", { x1: 0, x2: width, y1: height / 2, y2: height / 2, class: "axis" })))];
  }

  function ngrams(one) {
    if (!one.ngrams) return [];
    const more = one.more ? el("span", { class: "note" }, `and ${whole(one.more)} more reads`) : null;
    return [part("N-grams on this row", true, el("div", { class: "ngrams" },
      one.ngrams.map(([text, count]) => el("span", { class: "tok" }, text, el("small", {}, whole(count)))), more))];
  }

  function nearest(name, one) {
    if (!one.near || !one.near.length) return [];
    // Only slots that were looked into have more to show than their row here.
    const row = (slot) => card(name, slot) ? ["button", { onclick: () => change({ table: name, slot }, "#card") }] : ["div", {}];
    return [part("Nearest slots", true, el("div", { class: "near" }, one.near.map(([slot, cosine, words]) =>
      el(...row(slot), el("span", { class: "slot" }, whole(slot)),
        el("span", { class: "value" }, cosine.toFixed(2)),
        el("span", { class: "says" }, words.flatMap((word) => [el("span", { class: "tok" }, word), " "]))))))];
  }

  // ---- the table

  function drawTables() {
    const name = tableShown(), of = table(name), use = of.usage;
    $("table-note").textContent = `${whole(of.slots)} rows of ${of.width} ${of.dtype} numbers, read by ${of.readers.join(", ")}`;
    const tile = (value, label) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, label));
    $("tiles").replaceChildren(...(use ? [
      tile(whole(of.slots), "slots"),
      tile(percent(use.never), "are not read by the corpus"),
      tile(percent(use.top), "of all reads go to the top 1 %"),
      tile(`${short(use.entropy)} nats`, `of entropy, ${percent(use.entropy_share)} of log N`),
      tile(whole(use.reads), `reads by ${whole(data.corpus.tokens)} tokens`),
    ] : [tile(whole(of.slots), "slots"), tile("–", "no corpus was read")]));
    const plots = [];
    if (use) plots.push(el("div", {}, el("h3", {}, "Reads by rank"), rankPlot(name, of)));
    for (const [metric, title, form] of [["read_entropy", "Entropy of a step's reads over training, nats", short], ["slots_read_share", "Slots read so far, of all", percent]]) {
      const curve = of.curves && of.curves[metric];
      if (curve && curve[0].length > 1) {
        const most = metric === "read_entropy" ? Math.max(...curve[1]) * 1.06 : 1;
        plots.push(el("div", {}, el("h3", {}, title), plot(curve[0], curve[1], { y: [0, most], form, x: "step" })));
      }
    }
    $("plots").replaceChildren(...plots);
  }

  function rankPlot(name, of) {
    const use = of.usage, marks = [];
    if (of.slots >= 100) marks.push({ x: Math.max(Math.floor(of.slots / 100), 1), text: "top 1 %" });
    const one = state.slot != null && state.table === name ? card(name, state.slot) : null;
    const spot = one && one.rank && one.count ? [one.rank, one.count] : null;
    return plot(use.ranks, use.counts, { log: true, x: "rank of the slot", form: whole, marks, spot, xMost: of.slots });
  }

  /** Draws a curve with axes; on both axes logarithmic if `log`. */
  function plot(xs, ys, { log = false, x = "", y = null, form = String, marks = [], spot = null, xMost = null }) {
    const [width, height, left, right, top, bottom] = [460, 230, 58, 14, 12, 38];
    const scaled = log ? (v) => Math.log10(Math.max(v, 1)) : (v) => v;
    const xRange = [scaled(log ? 1 : 0), scaled(Math.max(xMost ?? 0, xs[xs.length - 1]))];
    const yRange = y || [0, Math.max(...ys.map(scaled)) * 1.04];
    const place = (v, [low, high], from, to) => from + ((v - low) / (high - low || 1)) * (to - from);
    const px = (v) => place(scaled(v), xRange, left, width - right), py = (v) => place(scaled(v), yRange, height - bottom, top);
    const ticks = (range, count) => {
      if (log) return Array.from({ length: Math.floor(range[1]) + 1 }, (_, i) => 10 ** i).filter((_, i, all) => i % Math.ceil(all.length / 6) === 0);
      const raw = (range[1] - range[0]) / count, unit = 10 ** Math.floor(Math.log10(raw || 1));
      const step = [1, 2, 2.5, 5, 10].map((n) => n * unit).find((n) => n >= raw) || 1;
      return Array.from({ length: Math.floor(range[1] / step + 1e-9) + 1 }, (_, i) => i * step);
    };
    const tick = (v) => (log && v >= 1e6 ? `${v / 1e6} M` : log && v >= 1e3 ? `${v / 1e3} k` : log ? String(v) : form(v));
    const lines = [
      ...ticks(yRange, 4).map((v) => [svg("line", { class: "axis", x1: left, x2: width - right, y1: py(v), y2: py(v) }),
        svg("text", { x: left - 8, y: py(v) + 4, "text-anchor": "end" }, tick(v))]),
      ...ticks(xRange, 5).map((v) => svg("text", { x: px(v), y: height - bottom + 18, "text-anchor": "middle" }, log ? tick(v) : whole(v))),
    ];
    const path = xs.map((v, i) => `${i ? "L" : "M"}${px(v).toFixed(1)} ${py(ys[i]).toFixed(1)}`).join("");
    const ground = py(log ? 1 : yRange[0]);
    return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": x },
      lines, svg("path", { class: "area", d: `${path}L${px(xs[xs.length - 1]).toFixed(1)} ${ground}L${px(xs[0]).toFixed(1)} ${ground}Z` }),
      svg("path", { class: "curve", d: path }),
      marks.map((mark) => [svg("line", { class: "guide", x1: px(mark.x), x2: px(mark.x), y1: top, y2: height - bottom }),
        svg("text", { x: px(mark.x) + 5, y: top + 11 }, mark.text)]),
      spot ? svg("circle", { class: "spot", cx: px(spot[0]), cy: py(spot[1]), r: 6 }) : null,
      svg("text", { x: width - right, y: height - 4, "text-anchor": "end" }, x));
  }

  // ---- beginning

  function makeTokens() {
    const parts = data.tokens.flatMap((token, i) => [
      el("button", { "data-token": i, class: token.special ? "special" : null, onclick: () => chooseToken(i) }, token.text),
      token.line ? el("br") : null,
    ]);
    $("tokens").replaceChildren(...parts.filter((one) => one != null));
  }

  /** Returns the token in the line above (-1) or below (1) that is nearest to a token. */
  function beside(token, lines) {
    const buttons = [...$("tokens").querySelectorAll("button")], here = buttons[token].getBoundingClientRect();
    const middle = (box) => box.left + box.width / 2;
    let best = token, least = Infinity;
    buttons.forEach((button, i) => {
      const box = button.getBoundingClientRect(), apart = Math.round((box.top - here.top) / (here.height * 0.8)) * lines;
      if (apart < 1) return;
      const far = apart * 1e5 + Math.abs(middle(box) - middle(here));
      if (far < least) [best, least] = [i, far];
    });
    return best;
  }

  $("tokens").addEventListener("keydown", (event) => {
    const last = data.tokens.length - 1;
    const to = { ArrowRight: () => Math.min(state.token + 1, last), ArrowLeft: () => Math.max(state.token - 1, 0), Home: () => 0, End: () => last,
      ArrowDown: () => beside(state.token, 1), ArrowUp: () => beside(state.token, -1) }[event.key];
    if (!to || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    chooseToken(to(), true);
  });
  $("list").addEventListener("keydown", (event) => {
    const buttons = [...$("list").children], at = buttons.indexOf(document.activeElement);
    const to = { ArrowDown: Math.min(at + 1, buttons.length - 1), ArrowUp: Math.max(at - 1, 0), Home: 0, End: buttons.length - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    buttons[to].click();
  });
  $("list").addEventListener("focusin", (event) => [...$("list").children].forEach((button) => { button.tabIndex = button === event.target ? 0 : -1; }));
  for (const tab of ["text", "tables"]) $("tab-" + tab).addEventListener("click", () => change({ tab }));
  document.querySelector("nav").addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    change({ tab: state.tab === "text" ? "tables" : "text" }, "nav [aria-selected=true]");
  });

  function render() {
    drawControls();
    drawTokens();
    drawList();
    drawCard();
    if (state.tab === "tables") drawTables();
  }

  $("subtitle").textContent = data.subtitle;
  $("text-note").textContent = data.note;
  makeTokens();
  recall();
  render();
})();
