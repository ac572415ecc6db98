"use strict";

const report = JSON.parse(document.getElementById("report").textContent);

// Elements. Text is only ever set as text: names come from the user's program.

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const icon = (name) => s("svg", { class: `icon ${name}`, "aria-hidden": "true" }, s("use", { href: `#${name}` }));
const estimate = () => h("span", { class: "estimate" }, "estimate");

// Numbers

function scaled(value, base, units) {
  let unit = 0;
  while (Math.abs(value) >= base && unit < units.length - 1) {
    value /= base;
    unit += 1;
  }
  const digits = unit === 0 ? 0 : Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${units[unit]}`;
}
const bytes = (value) => scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]);
const flops = (value) => scaled(value, 1000, ["FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"]);
const count = (value) => value.toLocaleString("en-US");
const both = (forward, backward) => `${forward ? bytes(forward) : "0"} + ${backward ? bytes(backward) : "0"}`;
const exact = (value) => `${count(value)} bytes`;
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

/** A share that says 100% only of all, and 0% only of nothing. */
function percent(share) {
  if (share === null) return "–";
  if (share === 1 || share === 0) return `${100 * share}%`;
  if (share > 0.999) return ">99.9%";
  if (share < 0.001) return "<0.1%";
  return `${(100 * share).toFixed(1)}%`;
}

function seconds(value) {
  if (value >= 1) return `${value.toFixed(2)} s`;
  return value >= 1e-3 ? `${(1e3 * value).toFixed(1)} ms` : `${(1e6 * value).toFixed(0)} µs`;
}

// The tree: a node for every run of ops, in program order, that one module made

const KINDS = {
  sharded: "sharded: each rank computes its part",
  replicated: "whole: every rank computes all of it",
  collective: "collective: the ranks exchange",
  input: "input",
  output: "output",
};

const isIndex = (label) => /^\d+$/.test(label);

function prepare(graph) {
  const ops = graph.ops;
  const index = new Map(ops.map((op, i) => [op.name, i]));
  const collectives = new Map(graph.collectives.map((each) => [each.name, each]));
  const users = ops.map(() => []);
  ops.forEach((op, i) => {
    for (const name of new Set(op.operands)) if (index.has(name)) users[index.get(name)].push(i);
  });
  const fallbacks = new Map();
  ops.forEach((op, i) => {
    const found = graph.fallbacks.find((each) => each.op === op.op && each.line === op.line);
    if (found) fallbacks.set(i, found);
  });
  return { graph, ops, index, collectives, users, fallbacks, modules: modulesOf(ops) };
}

/** How a value lies: its layout, or where a rank holds less than all of it. */
function layoutOf(data, i) {
  const op = data.ops[i];
  if (op.layout && !data.collectives.has(op.name)) return op.layout;
  const cut = op.shape.flatMap((size, dim) => (op.local_shape[dim] === size ? [] : [`S(${dim}: ${size})`]));
  if (cut.length) return cut.join(" ");
  return op.placement === "sharded" ? "a rank's part" : "whole";
}

/** What an op is, where its name does not say that already. */
function targetOf(op) {
  const short = op.op.replace(/^\w+\./, "");
  return op.op === op.placement || op.name.replace(/_\d+$/, "") === short ? "" : op.op;
}

/** The module path of every op; one that nobody knows is where its neighbours are. */
function modulesOf(ops) {
  const paths = ops.map((op) => (op.module ? op.module.split(".") : null));
  let before = [];
  for (let i = 0; i < paths.length; i += 1) {
    if (paths[i] !== null) {
      before = paths[i];
      continue;
    }
    if (ops[i].placement === "input" || ops[i].placement === "output") {
      paths[i] = [];
      continue;
    }
    let next = i;
    while (next < paths.length && paths[next] === null) next += 1;
    const after = next < paths.length ? paths[next] : [];
    let same = 0;
    while (same < before.length && same < after.length && before[same] === after[same]) same += 1;
    paths[i] = before.slice(0, same);
  }
  return paths;
}

function treeOf(data) {
  const root = moduleNode(data, data.graph.name, "", 0);
  data.ops.forEach((op, i) => {
    let at = root;
    const ends = op.placement === "input" ? ["inputs"] : op.placement === "output" ? ["outputs"] : null;
    (ends || data.modules[i]).forEach((label, depth) => {
      const last = at.children[at.children.length - 1];
      if (last === undefined || last.kind !== "module" || last.label !== label) {
        const path = ends ? "" : data.modules[i].slice(0, depth + 1).join(".");
        at.children.push(moduleNode(data, label, path, i));
      }
      at = at.children[at.children.length - 1];
    });
    at.children.push({ kind: data.collectives.has(op.name) ? "move" : "op", data, op: i, first: i, last: i });
  });
  finish(root);
  return root;
}

function moduleNode(data, label, path, first) {
  return { kind: "module", data, label, path, first, last: first, children: [] };
}

/** Sums, the folding of repeated children and the parents of a subtree. */
function finish(node) {
  node.sum = emptySum();
  if (node.kind === "op" || node.kind === "move") {
    addOp(node.sum, node.data, node.op);
    return;
  }
  for (const child of node.children) {
    finish(child);
    node.last = Math.max(node.last, child.last);
    addSum(node.sum, child.sum);
  }
  node.children = bundle(fold(node));
  const [only] = node.children;
  if (node.children.length === 1 && only.kind === "group") {
    only.label = only.shown || `${node.label}: ${only.label}`;
    only.path = node.path;
    Object.assign(node, only);
  }
  for (const child of node.children) child.parent = node;
}

function emptySum() {
  return {
    ops: 0,
    flopsSharded: 0,
    flopsWhole: 0,
    sharded: 0,
    whole: 0,
    forward: 0,
    backward: 0,
    launchesForward: 0,
    launchesBackward: 0,
    moves: 0,
    fallbacks: 0,
  };
}

function addSum(sum, other, times = 1) {
  for (const key of Object.keys(sum)) sum[key] += times * other[key];
}

function addOp(sum, data, i) {
  const op = data.ops[i];
  const move = data.collectives.get(op.name);
  if (op.placement !== "input" && op.placement !== "output") sum.ops += 1;
  if (op.placement === "sharded") {
    sum.sharded += 1;
    sum.flopsSharded += op.flops;
  } else if (op.placement === "replicated") {
    sum.whole += 1;
    sum.flopsWhole += op.flops;
  }
  if (move) {
    sum.moves += 1;
    sum.forward += move.bytes_forward;
    sum.backward += move.bytes_backward;
    sum.launchesForward += move.launches_forward;
    sum.launchesBackward += move.launches_backward;
  }
  if (data.fallbacks.has(i)) sum.fallbacks += 1;
}

/** All that the page says of a subtree but its names; operands by where they are inside of it. */
function signature(node) {
  const { data, first, last } = node;
  const depth = node.path ? node.path.split(".").length : 0;
  const parts = [];
  for (let i = first; i <= last; i += 1) {
    const op = data.ops[i];
    const move = data.collectives.get(op.name);
    const operands = op.operands.map((name) => {
      const at = data.index.get(name);
      return at >= first && at <= last ? at - first : "outside";
    });
    const moved = move && [
      move.op,
      move.bytes_forward,
      move.bytes_backward,
      move.launches_forward,
      move.launches_backward,
      move.padded_forward,
      move.padded_backward,
    ];
    parts.push([
      data.modules[i].slice(depth),
      op.op,
      op.placement,
      op.layout,
      op.shape,
      op.local_shape,
      op.dtype,
      op.flops,
      op.line,
      operands,
      moved,
      data.fallbacks.has(i),
    ]);
  }
  return JSON.stringify(parts);
}

/** Children with each run that repeats itself (layers, pairs of unlike layers) put together as a group. */
function fold(node) {
  const children = node.children;
  if (!children.some((child) => child.kind === "module")) return children;
  const keys = children.map((child) => {
    if (child.kind !== "module") return signature({ data: child.data, path: "", first: child.first, last: child.last });
    return `${isIndex(child.label) ? "#" : child.label} ${signature(child)}`;
  });
  const folded = [];
  let i = 0;
  while (i < children.length) {
    let best = null;
    for (let period = 1; period <= 24 && i + 2 * period <= children.length; period += 1) {
      if (!children.slice(i, i + period).some((child) => child.kind === "module" && child.sum.ops > 1)) continue;
      let end = i + period;
      while (end < children.length && keys[end] === keys[end - period]) end += 1;
      const times = Math.floor((end - i) / period);
      if (times >= 2 && (best === null || times * period > best.times * best.period)) best = { period, times };
    }
    if (best === null) {
      folded.push(children[i]);
      i += 1;
    } else {
      folded.push(group(node, children.slice(i, i + best.times * best.period), best));
      i += best.times * best.period;
    }
  }
  return folded;
}

/** Beside modules and collectives, ops that follow one another stand in one row. */
function bundle(children) {
  if (children.every((child) => child.kind === "op")) return children;
  const bundled = [];
  let i = 0;
  while (i < children.length) {
    let end = i;
    while (end < children.length && children[end].kind === "op") end += 1;
    if (end - i < 3) {
      bundled.push(...children.slice(i, Math.max(end, i + 1)));
      i = Math.max(end, i + 1);
      continue;
    }
    const members = children.slice(i, end);
    const { data } = members[0];
    const node = {
      kind: "run",
      data,
      path: "",
      first: members[0].first,
      last: members[members.length - 1].last,
      label: plural(members.length, "op"),
      children: members,
      sum: emptySum(),
      names: members.map((each) => data.ops[each.op].op.replace(/^aten\./, "")).join(", "),
    };
    for (const each of members) {
      addSum(node.sum, each.sum);
      each.parent = node;
    }
    bundled.push(node);
    i = end;
  }
  return bundled;
}

function group(parent, members, { period, times }) {
  const [first, last] = [members[0], members[members.length - 1]];
  const indices = members.every((each) => each.kind === "module" && isIndex(each.label));
  if (indices) for (const each of members) each.shown = `${parent.label}.${each.label}`;
  const node = {
    kind: "group",
    data: parent.data,
    path: parent.path,
    first: first.first,
    last: last.last,
    times,
    period,
    label: indices ? `${first.label}–${last.label}` : `${first.label || "…"} … ${last.label || "…"}`,
    shown: indices ? `${parent.label} ${first.label}–${last.label}` : "",
    sum: emptySum(),
    children: [],
  };
  for (const each of members) addSum(node.sum, each.sum);
  const rest = members.slice(period);
  node.children = members.slice(0, period);
  if (rest.length === 1) node.children.push(rest[0]);
  else {
    const [a, b] = [rest[0].label, rest[rest.length - 1].label];
    const tail = {
      kind: "rest",
      data: parent.data,
      path: parent.path,
      first: rest[0].first,
      last: last.last,
      label: indices ? `${parent.label}.${a}–${b}` : plural(times - 1, "repetition"),
      sum: emptySum(),
      children: rest,
      alike: indices ? node.children.map((each) => each.shown).join(", ") : "",
    };
    for (const each of rest) {
      addSum(tail.sum, each.sum);
      each.parent = tail;
    }
    node.children.push(tail);
  }
  for (const child of node.children) child.parent = node;
  return node;
}

const shareOf = (sum) => {
  const [part, all] =
    sum.flopsSharded + sum.flopsWhole > 0
      ? [sum.flopsSharded, sum.flopsSharded + sum.flopsWhole]
      : [sum.sharded, sum.sharded + sum.whole];
  return all > 0 ? part / all : null;
};

function placementOf(sum) {
  const share = shareOf(sum);
  if (share === null) return "idle";
  return share === 1 ? "sharded" : share === 0 ? "replicated" : "mixed";
}

// The rows of the tree, made when they are first opened

const graphs = report.graphs.map(prepare);
const roots = graphs.map(treeOf);
const leaves = graphs.map((data) => new Array(data.ops.length));
const tree = h("div", { role: "tree", "aria-label": "Modules and ops in program order", id: "tree" });

function collectLeaves(node) {
  if (node.kind === "op" || node.kind === "move") leaves[graphs.indexOf(node.data)][node.op] = node;
  else node.children.forEach(collectLeaves);
}

function shareCell(sum) {
  const share = shareOf(sum);
  if (share === null) return h("span", { class: "share" });
  const part = 100 * share;
  return h(
    "span",
    { class: "share" },
    h(
      "span",
      { class: "meter" },
      h("i", { class: "of-sharded", style: `width: ${part}%` }),
      h("i", { class: "of-whole", style: `left: ${part}%; width: ${100 - part}%` }),
    ),
    h("span", {}, percent(share)),
  );
}

function movedCell(forward, backward) {
  if (forward + backward === 0) return h("span", { class: "moved" });
  return h(
    "span",
    { class: "moved", title: `forward ${exact(forward)}, backward ${exact(backward)}` },
    icon("collective"),
    both(forward, backward),
  );
}

function rowOf(node, depth) {
  const cells = node.kind === "move" ? moveCells(node) : node.kind === "op" ? opCells(node) : moduleCells(node);
  const leaf = node.kind === "op" || node.kind === "move";
  const row = h(
    "div",
    {
      role: "treeitem",
      "aria-level": depth + 1,
      "aria-expanded": leaf ? null : "false",
      "aria-selected": "false",
      "aria-label": spoken(node),
      tabindex: "-1",
      style: `--depth: ${depth}`,
      class: `row ${node.kind}${node.late ? " late" : ""}`,
      "data-kind": node.kind,
      "data-name": leaf ? node.data.ops[node.op].name : node.shown || node.label,
    },
    cells,
  );
  row.node = node;
  node.row = row;
  node.depth = depth;
  return row;
}

const twist = () => h("span", { class: "twist" }, s("svg", { "aria-hidden": "true" }, s("use", { href: "#twist" })));

function moduleCells(node) {
  const { sum } = node;
  const alike = node.kind === "group" && node.period > 1 ? `, ${node.period} unlike in turn` : "";
  const notes = {
    group: h("span", { class: "times" }, `${node.times} × identical${alike}`),
    run: h("span", { class: "muted mono", title: node.names }, node.names),
    rest: h("span", { class: "muted" }, node.alike ? `identical to ${node.alike}` : "identical"),
    module: h("span", { class: "muted" }, sum.ops ? plural(sum.ops, "op") : count(node.last - node.first + 1)),
  };
  const { calls } = node.data.graph;
  return [
    h(
      "span",
      { class: "name" },
      twist(),
      icon(placementOf(sum)),
      h("b", { title: node.path || node.label }, node.shown || node.label),
      notes[node.kind],
      calls === 1 || node.parent ? null : h("span", { class: "times" }, `called ${count(calls)} times; numbers of one`),
      sum.fallbacks ? icon("fallback") : null,
    ),
    shareCell(sum),
    h("span", { class: "flops" }, sum.flopsSharded + sum.flopsWhole ? flops(sum.flopsSharded + sum.flopsWhole) : ""),
    movedCell(sum.forward, sum.backward),
  ];
}

function moveCells(node) {
  const { data, op } = node;
  const { name } = data.ops[op];
  const move = data.collectives.get(name);
  node.late = move.bytes_forward === 0;
  const change = `${layoutOf(data, data.index.get(data.ops[op].operands[0]))} → ${layoutOf(data, op)}`;
  const what = node.late ? (move.bytes_backward ? "moves in backward only" : "moves nothing") : change;
  return [
    h(
      "span",
      { class: "name" },
      h("span", { class: "twist" }),
      icon("collective"),
      h("b", { title: name }, name),
      h("span", { class: "edge" }),
    ),
    h("span", { class: "what mono", title: `${move.op}: ${what}` }, what),
    movedCell(move.bytes_forward, move.bytes_backward),
  ];
}

function opCells(node) {
  const { data, op } = node;
  const { name, placement, flops: work } = data.ops[op];
  const layout = layoutOf(data, op);
  return [
    h(
      "span",
      { class: "name" },
      h("span", { class: "twist" }),
      icon(placement),
      h("b", { title: name }, name),
      h("span", { class: "muted" }, targetOf(data.ops[op])),
      data.fallbacks.has(op) ? icon("fallback") : null,
    ),
    h("span", { class: "layout", title: layout }, placement === "input" || placement === "output" ? "" : layout),
    h("span", { class: "flops" }, work ? flops(work) : ""),
    h("span", {}),
  ];
}

function spoken(node) {
  const { sum, kind, data } = node;
  const moved = sum.moves
    ? `, ${plural(sum.moves, "collective")}, each rank receives ${bytes(sum.forward)} forward and ` +
      `${bytes(sum.backward)} backward`
    : "";
  if (kind === "move") return `${data.ops[node.op].name}, collective${moved}`;
  if (kind === "op") return `${data.ops[node.op].name}, ${KINDS[data.ops[node.op].placement]}`;
  const share = shareOf(sum);
  const runs = share === null ? "" : `, ${percent(share)} of its work sharded`;
  const times = kind === "group" ? `, ${node.times} times identical` : "";
  return `${node.label}${times}${runs}${moved}`;
}

function open(node, expanded = true) {
  const { row } = node;
  if (!row || !node.children) return;
  if (expanded && !node.box) {
    node.box = h(
      "div",
      { role: "group" },
      node.children.map((child) => rowOf(child, node.depth + 1)),
    );
    for (const child of [...node.box.children]) if (child.node.box) child.after(child.node.box);
    row.after(node.box);
  }
  if (node.box) node.box.hidden = !expanded;
  row.setAttribute("aria-expanded", String(expanded));
}

const isOpen = (node) => node.row && node.row.getAttribute("aria-expanded") === "true";

function reveal(node) {
  const above = [];
  for (let at = node.parent; at; at = at.parent) above.unshift(at);
  above.forEach((each) => open(each));
}

const holdsGroup = (node) => node.kind === "group" || (node.kind === "module" && node.children.some(holdsGroup));
const holdsMove = (node) => node.children.some((child) => child.kind === "move" && !lateMove(child));

/** The first look: down to the groups of layers, into the first layer of each, and to what moves there. */
function openFirst(node) {
  if (node.kind !== "module" && node.kind !== "group") return;
  const stands = node.parent && node.parent.kind === "group";
  const inLayer = node.path.split(".").some(isIndex);
  const wanted = !node.parent || holdsGroup(node) || (stands ? isFirst(node) : inLayer && holdsMove(node));
  if (!wanted) return;
  open(node);
  node.children.forEach(openFirst);
}

const isFirst = (node) => node.parent.children[0] === node;
const lateMove = (node) => node.data.collectives.get(node.data.ops[node.op].name).bytes_forward === 0;

let chosen = null;

function choose(node, { focus = true, scroll = true } = {}) {
  reveal(node);
  if (chosen) {
    chosen.row.setAttribute("aria-selected", "false");
    chosen.row.tabIndex = -1;
  }
  chosen = node;
  node.row.setAttribute("aria-selected", "true");
  node.row.tabIndex = 0;
  if (focus) node.row.focus({ preventScroll: true });
  if (scroll) node.row.scrollIntoView({ block: "nearest" });
  show(node);
}

const visibleRows = () => [...tree.querySelectorAll(".row")].filter((row) => row.offsetParent !== null);

tree.addEventListener("click", (event) => {
  const row = event.target.closest(".row");
  if (!row) return;
  const { node } = row;
  if (node.children) open(node, !isOpen(node));
  choose(node, { scroll: false });
});

tree.addEventListener("keydown", (event) => {
  if (!chosen || event.ctrlKey || event.altKey || event.metaKey) return;
  const rows = visibleRows();
  const at = rows.indexOf(chosen.row);
  const go = {
    ArrowDown: () => rows[at + 1] && rows[at + 1].node,
    ArrowUp: () => rows[at - 1] && rows[at - 1].node,
    Home: () => rows[0].node,
    End: () => rows[rows.length - 1].node,
    ArrowRight: () => {
      if (!chosen.children) return null;
      if (isOpen(chosen)) return chosen.children[0];
      open(chosen);
      return chosen;
    },
    ArrowLeft: () => {
      if (!chosen.children || !isOpen(chosen)) return chosen.parent;
      open(chosen, false);
      return chosen;
    },
    Enter: () => {
      open(chosen, !isOpen(chosen));
      return chosen;
    },
  };
  go[" "] = go.Enter;
  if (!(event.key in go)) return;
  event.preventDefault();
  const next = go[event.key]();
  if (next) choose(next);
});

// What is before and after one op, beside the tree

const panel = h("aside", {
  class: "card panel",
  id: "panel",
  "aria-label": "The chosen module or op",
  "aria-live": "polite",
});

function show(node) {
  panel.replaceChildren(...(node.kind === "op" || node.kind === "move" ? opPanel(node) : modulePanel(node)));
  panel.scrollTop = 0;
}

function facts(pairs) {
  const rows = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h(
    "dl",
    {},
    rows.map(([name, value, mono]) => [h("dt", {}, name), h("dd", { class: mono ? "mono" : null }, value)]),
  );
}

/** `bf16[1, 16384 of 131072, 4096]`: what a rank holds, of all. */
function shapeOf(op) {
  const sizes = op.local_shape.map((size, dim) =>
    size === op.shape[dim] ? [`${size}`] : [h("b", {}, `${size}`), ` of ${op.shape[dim]}`],
  );
  return [`${op.dtype}[`, ...sizes.flatMap((size, dim) => (dim ? [", ", ...size] : size)), "]"];
}

function stop(data, i, here) {
  const op = data.ops[i];
  const kind = data.collectives.has(op.name) ? "collective" : op.placement;
  const inside = [
    h("span", { class: "top" }, icon(kind), op.name, h("span", { class: "muted" }, targetOf(op))),
    h("span", { class: "under" }, op.dtype ? [`${layoutOf(data, i)}  `, ...shapeOf(op)] : layoutOf(data, i)),
  ];
  if (here) return h("div", { class: `stop ${kind}` }, inside);
  const go = () => choose(leaves[graphs.indexOf(data)][i]);
  return h(
    "button",
    { class: `stop ${kind}`, type: "button", "data-op": op.name, title: op.line, onclick: go },
    inside,
  );
}

const arrow = () => h("div", { class: "arrow" }, s("svg", { "aria-hidden": "true" }, s("use", { href: "#down" })));

function flow(data, i) {
  const op = data.ops[i];
  const before = op.operands.filter((name) => data.index.has(name)).map((name) => data.index.get(name));
  const after = data.users[i];
  return [
    h("h3", {}, before.length ? "Before: its operands" : "Nothing before it: no op makes it"),
    h(
      "div",
      { class: "flow", id: "before" },
      before.map((each) => stop(data, each)),
    ),
    before.length ? arrow() : null,
    stop(data, i, true),
    after.length ? arrow() : null,
    h(
      "h3",
      {},
      after.length
        ? `After: ${plural(after.length, "op")} that take${after.length === 1 ? "s" : ""} it`
        : "Nothing after it",
    ),
    h(
      "div",
      { class: "flow", id: "after" },
      after.map((each) => stop(data, each)),
    ),
  ].filter(Boolean);
}

/** What the transport counts, where that is more. */
function padding(move) {
  if (!move || (move.padded_forward === move.bytes_forward && move.padded_backward === move.bytes_backward)) return "";
  return both(move.padded_forward, move.padded_backward);
}

function opPanel(node) {
  const { data, op: i } = node;
  const op = data.ops[i];
  const move = data.collectives.get(op.name);
  const fallback = data.fallbacks.get(i);
  const site = data.graph.sites.find((each) => each.module === op.module && each.line === op.line);
  const parts = [h("div", { class: "title" }, icon(move ? "collective" : op.placement), op.name)];
  if (move) {
    parts.push(
      h(
        "p",
        { class: "big", title: `${exact(move.bytes_forward)} + ${exact(move.bytes_backward)}` },
        `${bytes(move.bytes_forward)} forward + ${bytes(move.bytes_backward)} backward`,
      ),
      h(
        "p",
        { class: "muted" },
        `received by each rank, in ${move.launches_forward} + ${plural(move.launches_backward, "launch").replace("launchs", "launches")}`,
      ),
    );
  } else parts.push(h("p", { class: "muted" }, KINDS[op.placement] || op.placement));
  parts.push(
    facts([
      ["op", op.op === op.placement ? "" : op.op, true],
      ["role", move && move.role !== op.name ? move.role : "", true],
      ["module", data.modules[i].join("."), true],
      ["your line", op.line, true],
      [
        "layout",
        move && move.bytes_forward
          ? `${layoutOf(data, data.index.get(op.operands[0]))} → ${layoutOf(data, i)}`
          : layoutOf(data, i),
        true,
      ],
      ["with padding", padding(move)],
      ["FLOPs, all ranks' work", op.flops ? flops(op.flops) : ""],
      ["strategy", site && site.strategy],
      ["why", site && site.reason],
    ]),
  );
  if (fallback) parts.push(h("div", { class: "notes" }, h("ul", {}, fallbackItem(fallback))));
  parts.push(...flow(data, i));
  return parts;
}

function modulePanel(node) {
  const { sum, data } = node;
  const moves = [];
  const each = node.kind === "group" ? node.children.slice(0, node.period) : [node];
  for (const one of each) {
    for (let i = one.first; i <= one.last; i += 1) if (data.collectives.has(data.ops[i].name)) moves.push(i);
  }
  const share = shareOf(sum);
  const all = sum.flopsSharded + sum.flopsWhole;
  const runs = all ? `${flops(sum.flopsSharded)} sharded, ${flops(sum.flopsWhole)} whole` : "no arithmetic";
  const total = sum.forward + sum.backward;
  return [
    h("div", { class: "title" }, icon(placementOf(sum)), node.path || node.label),
    node.kind === "group"
      ? h("p", {}, `${node.label}: ${node.times} × identical. Its collectives are listed for one.`)
      : null,
    facts([
      ["called", data.graph.calls === 1 ? "" : `${count(data.graph.calls)} times in a step; below is one call`],
      ["ops", `${count(sum.sharded)} sharded, ${count(sum.whole)} whole, ${plural(sum.moves, "collective")}`],
      ["FLOPs", share === null ? runs : `${runs} (${percent(share)} sharded)`],
      ["each rank receives", sum.moves ? `${bytes(sum.forward)} forward + ${bytes(sum.backward)} backward` : "nothing"],
      ["fallbacks", sum.fallbacks ? String(sum.fallbacks) : ""],
    ]),
    moves.length ? h("h3", {}, moves.length > 12 ? "Collectives by role" : "Collectives in program order") : null,
    moves.length > 12
      ? roles(data, moves)
      : h(
          "div",
          { class: "flow" },
          moves.map((i) => stop(data, i)),
        ),
    total === 0 && sum.moves === 0 ? h("p", { class: "muted" }, "Nothing moves between ranks here.") : null,
  ].filter(Boolean);
}

function roles(data, moves) {
  const rows = tally(
    moves.map((i) => ({ i, move: data.collectives.get(data.ops[i].name) })),
    ({ move }) => move.role.replace(/\d+/g, "*"),
  );
  const sum = (all, key) => all.reduce((total, each) => total + each.move[key], 0);
  return h(
    "div",
    { class: "bars" },
    rows.map(({ item, all }) => [
      h(
        "button",
        { type: "button", title: "Go to the first", onclick: () => choose(leaves[graphs.indexOf(data)][item.i]) },
        all.length > 1 ? item.move.role.replace(/\d+/g, "*") : item.move.role,
      ),
      h("span", { class: "muted" }, `× ${count(all.length)}`),
      h("span", { class: "number" }, both(sum(all, "bytes_forward"), sum(all, "bytes_backward"))),
    ]),
  );
}

function step(direction) {
  const moves = leaves.flat().filter((leaf) => leaf.kind === "move" && !lateMove(leaf));
  const all = leaves.flat();
  const at = chosen ? all.findIndex((leaf) => leaf.data === chosen.data && leaf.op === chosen.first) : 0;
  const placed = moves.map((leaf) => [all.indexOf(leaf), leaf]);
  const past = chosen && !chosen.children ? 1 : 0;
  const next = direction > 0 ? placed.find(([i]) => i >= at + past) : placed.reverse().find(([i]) => i < at);
  if (next) choose(next[1], { focus: false });
}

// Summary

function tile(title, figure, ...rest) {
  return h("section", { class: "card tile" }, h("h2", {}, title), h("div", { class: "figure" }, figure), ...rest);
}

function meter(share, kind, bound) {
  return h(
    "div",
    { class: "meter", "aria-hidden": "true" },
    h("i", { class: kind, style: `width: ${100 * Math.min(share, 1)}%` }),
    bound === undefined ? null : h("i", { class: "bound", style: `left: calc(${100 * Math.min(bound, 1)}% - 1px)` }),
  );
}

function tiles() {
  const t = report.totals;
  const parts = [];
  const moved = t.bytes_forward + t.bytes_backward;
  const bound = t.lower_bound_forward + t.lower_bound_backward;
  parts.push(
    tile(
      "Each rank receives, a step",
      h("span", { id: "moved", title: exact(moved) }, bytes(moved)),
      meter(1, "of-moved", moved ? bound / moved : 0),
      h("p", {}, `${bytes(t.bytes_forward)} forward, ${bytes(t.bytes_backward)} backward`),
      h("p", {}, `in ${count(t.launches_forward)} + ${count(t.launches_backward)} launches`),
    ),
    tile(
      "Beside the lower bound",
      bound ? `${(moved / bound).toFixed(2)} ×` : "–",
      h("p", {}, `The least that must move: ${bytes(bound)}`),
      h("p", {}, `forward ${bytes(t.lower_bound_forward)}, backward ${bytes(t.lower_bound_backward)}`),
    ),
  );
  const work = t.flops_sharded + t.flops_replicated;
  const share = work ? t.flops_sharded / work : null;
  parts.push(
    tile(
      "FLOPs that run sharded",
      percent(share),
      meter(share || 0, "of-sharded"),
      h("p", {}, `each rank does 1/${report.sp_size} of ${flops(t.flops_sharded)}`),
      h("p", {}, `and all of ${flops(t.flops_replicated)}`),
    ),
  );
  if (t.activation_bytes_one_device) {
    parts.push(
      tile(
        "Activations of a rank",
        [bytes(t.activation_bytes), estimate()],
        meter(t.activation_bytes / t.activation_bytes_one_device, "of-sharded"),
        h(
          "p",
          {},
          `at the peak of a forward: ${percent(t.activation_bytes / t.activation_bytes_one_device)} of one device's ${bytes(t.activation_bytes_one_device)}`,
        ),
      ),
    );
  }
  const links = report.links;
  parts.push(
    t.seconds
      ? tile(
          "Communication, a step",
          [seconds(t.seconds.forward + t.seconds.backward), estimate()],
          h(
            "p",
            {},
            `${seconds(t.seconds.forward)} forward, ${seconds(t.seconds.backward)} backward, nothing overlapped`,
          ),
          links
            ? h(
                "p",
                {},
                `at ${scaled(links.bandwidth, 1000, ["B/s", "KB/s", "MB/s", "GB/s", "TB/s"])}, ${seconds(links.latency)} a launch`,
              )
            : null,
        )
      : tile(
          "Communication, a step",
          "not timed",
          h("p", {}, "Give the bandwidth and latency of the links, or measure them: sp_compile.measure_links()"),
        ),
  );
  const fallbacks = report.graphs.flatMap((graph) => graph.fallbacks);
  const cost = fallbacks.reduce((sum, each) => sum + ((each.cost && each.cost.bytes) || 0), 0);
  parts.push(
    tile(
      "Fallbacks",
      fallbacks.length ? [icon("fallback"), ` ${count(fallbacks.length)}`] : "none",
      h(
        "p",
        {},
        fallbacks.length
          ? [`cost ${bytes(cost)} a rank, forward: `, h("a", { href: "#fallbacks" }, "why, and what to do")]
          : "No op runs on gathered values for want of a rule.",
      ),
    ),
  );
  return h("div", { class: "tiles" }, parts);
}

// Whether the page's own sums give the totals that it was handed

function disagreements() {
  const found = [];
  const sum = emptySum();
  roots.forEach((root) => addSum(sum, root.sum, root.data.graph.calls));
  const t = report.totals;
  const compare = (what, drawn, told, format) => {
    const rounding = Number.isSafeInteger(told) ? 0 : 1e-12 * told; // of numbers beyond 2^53
    if (Math.abs(drawn - told) <= rounding) return;
    found.push(`${what}: the ops sum to ${format(drawn)}, the totals say ${format(told)}.`);
  };
  compare("Received forward", sum.forward, t.bytes_forward, exact);
  compare("Received backward", sum.backward, t.bytes_backward, exact);
  compare("Launches forward", sum.launchesForward, t.launches_forward, count);
  compare("Launches backward", sum.launchesBackward, t.launches_backward, count);
  compare("FLOPs that run sharded", sum.flopsSharded, t.flops_sharded, count);
  compare("FLOPs that run whole", sum.flopsWhole, t.flops_replicated, count);
  for (const data of graphs) {
    for (const name of data.collectives.keys()) {
      if (!data.index.has(name)) found.push(`${data.graph.name} has no op ${name}, which is listed as a collective.`);
    }
    data.ops.forEach((op) =>
      op.operands.forEach((name) => {
        if (!data.index.has(name)) found.push(`${data.graph.name}: ${op.name} takes ${name}, which is no op.`);
      }),
    );
  }
  return found;
}

function alarm() {
  const found = disagreements();
  if (!found.length) return null;
  return h(
    "section",
    { class: "card alarm", role: "alert", id: "disagree" },
    h("h2", {}, icon("fallback"), " These numbers disagree; do not rely on this page"),
    h(
      "ul",
      {},
      found.slice(0, 12).map((each) => h("li", {}, each)),
    ),
    found.length > 12 ? h("p", {}, `and ${found.length - 12} more`) : null,
  );
}

function fallbackItem(each) {
  const cost = each.cost || {};
  const costs = [
    cost.bytes ? `${bytes(cost.bytes)} received a rank` : "",
    cost.flops ? `${flops(cost.flops)} on every rank` : "",
  ];
  return h(
    "li",
    {},
    h("div", {}, h("b", { class: "mono" }, each.op), " ", h("span", { class: "mono muted" }, each.line)),
    h("p", {}, each.why),
    costs.some(Boolean)
      ? h("p", { class: "muted" }, `It costs ${costs.filter(Boolean).join(" and ")}, each forward.`)
      : null,
    each.remedy ? h("p", { class: "remedy" }, each.remedy) : null,
  );
}

/** Equal things once, with how often. */
function tally(items, keyOf) {
  const seen = new Map();
  for (const item of items) {
    const key = JSON.stringify(keyOf(item));
    if (seen.has(key)) seen.get(key).all.push(item);
    else seen.set(key, { item, all: [item] });
  }
  return [...seen.values()];
}

function notes() {
  const fallbacks = report.graphs.flatMap((graph) => graph.fallbacks);
  const outputs = report.graphs.flatMap((graph) =>
    graph.outputs.filter((each) => each.expensive).map((each) => ({ ...each, graph: graph.name })),
  );
  const parts = [];
  const partly = [report.incomplete && `This report is not complete: ${report.incomplete}.`].filter(Boolean);
  const alike = (key, said) => {
    for (const { item, all } of tally(report.graphs.filter(key), key)) {
      partly.push(`${all.map((each) => each.name).join(", ")} ${said}: ${key(item)}`);
    }
  };
  alike((graph) => graph.unsharded, "runs whole on every rank");
  alike((graph) => graph.ends, "ends at a graph break");
  if (partly.length) {
    parts.push(
      h(
        "section",
        { class: "card notes", id: "partly" },
        h("h2", {}, icon("fallback"), " What this report does not cover, or runs whole"),
        h(
          "ul",
          {},
          partly.map((each) => h("li", {}, each)),
        ),
      ),
    );
  }
  if (fallbacks.length) {
    parts.push(
      h(
        "section",
        { class: "card notes", id: "fallbacks" },
        h("h2", {}, icon("fallback"), " Fallbacks: what runs on gathered values, and what you can do"),
        h(
          "ul",
          {},
          tally(fallbacks, ({ op, line, why, cost, remedy }) => [op, line, why, cost, remedy]).map(({ item, all }) => {
            const entry = fallbackItem(item);
            if (all.length > 1) entry.firstChild.append(h("span", { class: "muted" }, ` × ${all.length}, each`));
            return entry;
          }),
        ),
      ),
    );
  }
  if (outputs.length) {
    parts.push(
      h(
        "section",
        { class: "card notes", id: "outputs" },
        h("h2", {}, "Outputs that are dear to gather"),
        h(
          "ul",
          {},
          outputs.map((each) =>
            h(
              "li",
              {},
              h("b", { class: "mono" }, each.name),
              report.graphs.length > 1 ? ` of ${each.graph} ` : " ",
              h("span", { class: "mono muted" }, `[${(each.shape || []).join(", ")}]`),
              h("p", {}, `Each rank receives ${bytes(each.bytes)} to hold all of it.`),
              each.remedy ? h("p", { class: "remedy" }, each.remedy) : null,
            ),
          ),
        ),
      ),
    );
  }
  return parts;
}

// Charts

const tableOf = (heads, rows) =>
  h(
    "div",
    { class: "wide" },
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          heads.map((head, i) => h("th", { class: i ? "number" : null, scope: "col" }, head)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((row) =>
          h(
            "tr",
            {},
            row.map((cell, i) => h("td", { class: i ? "number" : "mono" }, cell)),
          ),
        ),
      ),
    ),
  );

/** Collectives by layer: by the module path up to its first number; what is in no layer, by its outermost module. */
function byLayer() {
  const layers = new Map();
  const elsewhere = new Map();
  graphs.forEach((data, g) => {
    data.ops.forEach((op, i) => {
      const move = data.collectives.get(op.name);
      if (!move) return;
      const path = data.modules[i];
      const number = path.findIndex(isIndex);
      const inside = number >= 0;
      const label = inside ? path.slice(0, number + 1).join(".") : path.join(".") || move.role;
      const key = `${graphs.length > 1 ? `${data.graph.name} ` : ""}${label}`;
      const to = inside ? layers : elsewhere;
      if (!to.has(key))
        to.set(key, {
          label: key,
          short: inside ? path[number] : key,
          stack: inside ? path.slice(0, number).join(".") : "",
          forward: 0,
          backward: 0,
          first: leaves[g][i],
        });
      to.get(key).forward += data.graph.calls * move.bytes_forward;
      to.get(key).backward += data.graph.calls * move.bytes_backward;
    });
  });
  const rest = [...elsewhere.values()].sort((a, b) => b.forward + b.backward - a.forward - a.backward);
  return { layers: [...layers.values()], elsewhere: rest };
}

/** Round numbers in units of bytes for an axis up to `top`. */
function ticks(top) {
  if (top <= 0) return [0];
  const unit = 1024 ** Math.max(0, Math.floor(Math.log(top) / Math.log(1024)));
  const raw = top / unit / 4;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = unit * power * [1, 2, 2.5, 5, 10].find((each) => each * power >= raw - 1e-9);
  const found = [];
  for (let at = 0; at <= top * 1.0001; at += step) found.push(at);
  return found;
}

const W = 640;
const LEFT = 66;
const TOP = 18;

function frame(height, top, label) {
  const chart = s("svg", {
    class: "chart",
    viewBox: `0 0 ${W} ${height + TOP + 40}`,
    role: "img",
    "aria-label": label,
  });
  const y = (value) => TOP + height - (top ? (value / top) * height : 0);
  for (const tick of ticks(top)) {
    chart.append(
      s("line", { x1: LEFT, x2: W, y1: y(tick), y2: y(tick), class: tick ? "grid" : "axis" }),
      s("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, tick ? bytes(tick).replace(/\.0+ /, " ") : "0"),
    );
  }
  return { chart, y };
}

function bar(attributes, value, title, go) {
  return s("rect", { ...attributes, "data-bytes": value, onclick: go || null }, s("title", {}, title));
}

function layersChart() {
  const { layers, elsewhere } = byLayer();
  const sum = (items) => items.reduce((total, each) => total + each.forward + each.backward, 0);
  const [inLayers, outside] = [sum(layers), sum(elsewhere)];
  const parts = [
    h("h2", {}, "Bytes per layer"),
    h(
      "p",
      { class: "muted" },
      `What each rank receives in a step: ${bytes(inLayers)} in layers + ${bytes(outside)} outside = ${bytes(inLayers + outside)}.`,
    ),
    h(
      "div",
      { class: "legend" },
      h("span", {}, swatch("var(--moved)"), "forward"),
      h("span", {}, swatch("url(#hatch-moved)"), "backward"),
    ),
  ];
  if (layers.length) {
    const height = 190;
    const top = Math.max(...layers.map((each) => each.forward + each.backward));
    const { chart, y } = frame(
      height,
      top,
      "Bytes that each rank receives, per layer; the table below has the numbers",
    );
    const slot = (W - LEFT) / layers.length;
    const width = Math.min(slot * 0.72, 56);
    const every = Math.ceil(layers.length / 20);
    layers.forEach((each, i) => {
      const x = LEFT + slot * i + (slot - width) / 2;
      const go = () => choose(each.first);
      const told = `${each.label}: forward ${bytes(each.forward)}, backward ${bytes(each.backward)}`;
      chart.append(
        bar(
          { x, width, y: y(each.forward), height: y(0) - y(each.forward), fill: "var(--moved)", class: "forward" },
          each.forward,
          told,
          go,
        ),
        bar(
          {
            x,
            width,
            y: y(each.forward + each.backward),
            height: y(each.forward) - y(each.forward + each.backward),
            fill: "url(#hatch-moved)",
            class: "backward",
          },
          each.backward,
          told,
          go,
        ),
      );
      if (i % every === 0)
        chart.append(s("text", { x: x + width / 2, y: y(0) + 16, "text-anchor": "middle" }, each.short));
      if (layers.length <= 8)
        chart.append(
          s(
            "text",
            { class: "value", x: x + width / 2, y: y(each.forward + each.backward) - 5, "text-anchor": "middle" },
            bytes(each.forward + each.backward),
          ),
        );
    });
    const stacks = tally(layers, (each) => each.stack);
    for (const { item, all } of stacks) {
      const middle = all.reduce((sum, each) => sum + layers.indexOf(each) + 0.5, 0) / all.length;
      chart.append(
        s(
          "text",
          { x: LEFT + slot * middle, y: y(0) + 34, "text-anchor": "middle" },
          stacks.length > 1 ? item.stack : "layer",
        ),
      );
    }
    parts.push(chart);
  }
  if (elsewhere.length) {
    const top = Math.max(...elsewhere.map((each) => each.forward + each.backward), 1);
    const shown = elsewhere.slice(0, 8);
    const rest = elsewhere.slice(8);
    const line = (label, forward, backward, go) => [
      go ? h("button", { type: "button", onclick: go, title: label }, label) : h("span", {}, label),
      h(
        "span",
        { class: "meter" },
        h("i", { class: "of-moved", style: `width: ${(100 * forward) / top}%`, "data-bytes": forward }),
        h("i", {
          class: "of-back",
          style: `left: ${(100 * forward) / top}%; width: ${(100 * backward) / top}%`,
          "data-bytes": backward,
        }),
      ),
      h(
        "span",
        { class: "number", title: `forward ${exact(forward)}, backward ${exact(backward)}` },
        both(forward, backward),
      ),
    ];
    parts.push(
      h("h3", {}, "Outside the layers (on a scale of its own; forward + backward)"),
      h(
        "div",
        { class: "bars" },
        shown.map((each) => line(each.label, each.forward, each.backward, () => choose(each.first))),
        rest.length
          ? line(
              `${rest.length} others`,
              rest.reduce((t, e) => t + e.forward, 0),
              rest.reduce((t, e) => t + e.backward, 0),
            )
          : null,
      ),
    );
  }
  if (!layers.length && !elsewhere.length) parts.push(h("p", {}, "Nothing moves between ranks."));
  else {
    parts.push(
      h(
        "details",
        {},
        h("summary", {}, "The same as a table"),
        tableOf(
          ["where", "forward", "backward"],
          [...layers, ...elsewhere].map((each) => [each.label, exact(each.forward), exact(each.backward)]),
        ),
      ),
    );
  }
  return h("section", { class: "card", id: "layers" }, parts);
}

const swatch = (fillWith) =>
  s(
    "svg",
    { width: 16, height: 12, "aria-hidden": "true" },
    s("rect", { width: 16, height: 12, style: `fill: ${fillWith}; stroke: var(--faint); stroke-width: .5` }),
  );

const STRATEGIES = {
  ulysses: "var(--sharded)",
  all_gather_kv: "url(#hatch-whole)",
  local: "url(#dots-local)",
  replicate: "url(#cross-idle)",
};
const FILLS = [...Object.values(STRATEGIES), "var(--moved)", "url(#hatch-moved)"];

function scalingChart() {
  const rows = report.scaling || [];
  if (!rows.length) return null;
  const all = [...new Set(rows.flatMap((row) => Object.keys(row.strategies)))];
  const names = all.filter((name) => rows.some((row) => row.strategies[name]));
  const fillOf = (name) => STRATEGIES[name] || FILLS[names.indexOf(name) % FILLS.length];
  const taken = new Set(report.graphs.flatMap((graph) => graph.sites).map((site) => site.strategy));
  const values = rows.flatMap((row) => Object.values(row.strategies)).filter((value) => value !== null);
  const top = Math.max(...values, 1);
  const height = 190;
  const { chart, y } = frame(
    height,
    top,
    "Bytes of each strategy over the number of ranks; the table below has the numbers",
  );
  const slot = (W - LEFT) / rows.length;
  rows.forEach((row, i) => {
    const x0 = LEFT + slot * i;
    if (row.sp_size === report.sp_size)
      chart.append(s("rect", { class: "here", x: x0 + 2, y: TOP - 14, width: slot - 4, height: height + 36, rx: 4 }));
  });
  chart.append(s("line", { x1: LEFT, x2: W, y1: y(0), y2: y(0), class: "axis" }));
  rows.forEach((row, i) => {
    const width = Math.min((slot * 0.82) / names.length, 34);
    const x0 = LEFT + slot * i + (slot - width * names.length) / 2;
    names.forEach((name, j) => {
      const value = row.strategies[name];
      if (value === null || value === undefined) return;
      const told = `${name} on ${row.sp_size} ranks: ${bytes(value)}`;
      chart.append(
        bar(
          {
            x: x0 + width * j + 1,
            width: width - 2,
            y: y(value),
            height: y(0) - y(value),
            fill: fillOf(name),
            class: "strategy",
          },
          value,
          told,
        ),
      );
      const label = bytes(value).replace(/ (.).*/, "$1");
      if (width >= 24)
        chart.append(
          s("text", { class: "value", x: x0 + width * (j + 0.5), y: y(value) - 4, "text-anchor": "middle" }, label),
        );
    });
    chart.append(
      s("text", { x: LEFT + slot * (i + 0.5), y: y(0) + 16, "text-anchor": "middle" }, `P = ${row.sp_size}`),
    );
  });
  return h(
    "section",
    { class: "card", id: "scaling" },
    h("h2", {}, "Bytes per strategy over P"),
    h(
      "p",
      { class: "muted" },
      "What each rank would receive for its largest attention site, forward, on P ranks. The P of this report stands on grey.",
    ),
    h(
      "div",
      { class: "legend" },
      names.map((name) => h("span", {}, swatch(fillOf(name)), name, taken.has(name) ? h("b", {}, "(taken)") : null)),
      all
        .filter((name) => !names.includes(name))
        .map((name) => h("span", {}, `${name}: nothing`, taken.has(name) ? h("b", {}, "(taken)") : null)),
    ),
    chart,
    h(
      "details",
      {},
      h("summary", {}, "The same as a table"),
      tableOf(
        ["P", ...all],
        rows.map((row) => [
          String(row.sp_size),
          ...all.map((name) =>
            row.strategies[name] === null || row.strategies[name] === undefined ? "–" : exact(row.strategies[name]),
          ),
        ]),
      ),
    ),
  );
}

// Attention sites

function sitesTable() {
  const all = report.graphs.flatMap((graph) => graph.sites);
  if (!all.length) return null;
  const rows = tally(all, (site) => [
    site.module.replace(/\d+/g, "#"),
    site.line,
    site.heads,
    site.kv_heads,
    site.length,
    site.strategy,
    site.bytes,
    site.reason,
    site.others,
  ]);
  const cells = rows.map(({ item, all: same }) => {
    const last = same[same.length - 1].module;
    const ends = last === item.module ? last : `${item.module} … ${last}`;
    return h(
      "tr",
      {},
      h("td", { class: "mono" }, ends || "–"),
      h("td", { class: "number" }, count(same.length)),
      h("td", { class: "number" }, item.heads === item.kv_heads ? `${item.heads}` : `${item.heads} / ${item.kv_heads}`),
      h("td", { class: "number" }, item.length === null ? "–" : count(item.length)),
      h("td", {}, h("b", {}, item.strategy), h("div", { class: "muted" }, item.reason)),
      h("td", { class: "number", title: exact(item.bytes) }, bytes(item.bytes)),
      h(
        "td",
        {},
        (item.others || []).map((other) =>
          h(
            "div",
            {},
            `${other.strategy} `,
            h("span", { class: "muted" }, other.bytes === null ? "not possible" : bytes(other.bytes)),
          ),
        ),
      ),
      h("td", { class: "mono" }, item.line),
    );
  });
  return h(
    "section",
    { class: "card", id: "sites" },
    h("h2", {}, "Attention"),
    h(
      "div",
      { class: "wide" },
      h(
        "table",
        {},
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            [
              "module",
              "sites",
              "heads / KV",
              "length",
              "strategy, and why",
              "each rank receives, a site, forward",
              "not taken",
              "your line",
            ].map((head, i) => h("th", { scope: "col", class: [1, 2, 3, 5].includes(i) ? "number" : null }, head)),
          ),
        ),
        h("tbody", {}, cells),
      ),
    ),
  );
}

// The page

function legend() {
  const item = (name, text) => h("span", {}, icon(name), text);
  return h(
    "div",
    { class: "legend" },
    item("sharded", "sharded: each rank does its part"),
    item("replicated", "whole: every rank does all"),
    item("mixed", "some of each"),
    item("collective", "collective; dotted: in backward only"),
    item("idle", "no arithmetic"),
    item("input", "input"),
    item("output", "output"),
    item("fallback", "fallback"),
  );
}

function closeAll() {
  const walk = (node) => {
    if (!node.children) return;
    open(node, false);
    node.children.forEach(walk);
  };
  roots.forEach((root) => {
    walk(root);
    open(root);
  });
  choose(roots[0]);
}

function draw() {
  const total = graphs.reduce((sum, data) => sum + data.ops.length, 0);
  roots.forEach((root) => {
    collectLeaves(root);
    tree.append(rowOf(root, 0));
  });
  const go = (direction) => () => step(direction);
  fill(document.getElementById("page"), {}, [
    h(
      "header",
      { class: "head" },
      h("h1", {}, report.model),
      h(
        "p",
        {},
        `split along the sequence over ${count(report.sp_size)} ranks · ${plural(graphs.length, "graph")}, ${plural(total, "op")}`,
      ),
    ),
    alarm(),
    tiles(),
    ...notes(),
    h(
      "div",
      { class: "main" },
      h(
        "section",
        { class: "card" },
        h(
          "div",
          { class: "bar-of-tools" },
          h("h2", { id: "program" }, "The program, in order"),
          h(
            "span",
            {},
            h("button", { type: "button", id: "previous", onclick: go(-1) }, "previous collective"),
            " ",
            h("button", { type: "button", id: "next", onclick: go(1) }, "next collective"),
            " ",
            h("button", { type: "button", id: "close", onclick: closeAll }, "close all"),
          ),
        ),
        legend(),
        h(
          "div",
          { class: "columns", "aria-hidden": "true" },
          h("span", {}, "module, op"),
          h("span", {}, "work that is sharded"),
          h("span", {}, "FLOPs, all"),
          h("span", {}, "received: forward + back"),
        ),
        tree,
      ),
      panel,
    ),
    h("div", { class: "charts" }, layersChart(), scalingChart()),
    sitesTable(),
    h(
      "footer",
      {},
      h(
        "p",
        {},
        "Bytes are what each rank receives, own block and padding excluded; they follow from the shapes of the graph and are what the program moves. ",
        "A step is one forward and one backward. FLOPs are those of the forward; sharded work is counted whole, over all ranks. What no activation enters (masks, position tables) counts as none.",
      ),
      h(
        "p",
        {},
        "Memory and time are estimates: memory is the peak of a walk over the forward graph in which each value is freed after its last use, before the inner backend fuses anything; ",
        "time is that of the collectives alone, by the bandwidth and latency of the links. Neither was measured on your devices.",
      ),
      h("p", {}, "In the tree: click, or arrow keys, Home, End and Enter."),
    ),
  ]);
  roots.forEach(openFirst);
  choose(roots[0], { focus: false, scroll: false });
  document.body.dataset.ready = "true";
}

draw();
