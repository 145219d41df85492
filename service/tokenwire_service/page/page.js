// Asks each second how the gateway stands, and draws it.

const KEPT = 300; // seconds
const MINUTE = 60;

let seconds = [];
let next = 0; // number of the first second not yet here

const number = (text) => Number(text ?? 0);
const milliseconds = (duration) =>
  duration === undefined ? null : Number.parseFloat(duration) * 1000; // JSON has "0.25s"
const total = (counts) => counts.reduce((sum, each) => sum + number(each.count), 0);
const mean = (values) =>
  values.length ? values.reduce((sum, each) => sum + each, 0) / values.length : 0;
const short = (value) =>
  value >= 1000 ? Math.round(value).toLocaleString("en") : String(Math.round(value * 10) / 10);

const plots = [
  {
    title: "Calls running",
    lines: [(second) => second.inFlight],
    told: () => short(seconds.at(-1)?.inFlight ?? 0),
  },
  {
    title: "Deltas per second",
    lines: [(second) => number(second.deltas)],
    told: (minute) => short(mean(minute.map((second) => number(second.deltas)))),
  },
  {
    title: "First text, ms: median, p99",
    lines: [
      (second) => milliseconds(second.firstTextP50),
      (second) => milliseconds(second.firstTextP99),
    ],
    told: (minute) => {
      const middle = minute.map((second) => milliseconds(second.firstTextP50));
      const known = middle.filter((each) => each !== null).sort((a, b) => a - b);
      return known.length ? short(known[Math.floor(known.length / 2)]) : "none";
    },
  },
  {
    title: "Calls ended per second: OK, failed",
    lines: [(second) => number(second.succeeded), (second) => total(second.failed)],
    told: (minute) =>
      `${short(mean(minute.map((second) => number(second.succeeded))))}, ` +
      short(mean(minute.map((second) => total(second.failed)))),
  },
  {
    title: "Attempts per second: all, faulty",
    lines: [(second) => number(second.attempts), (second) => total(second.faults)],
    told: (minute) => short(mean(minute.map((second) => number(second.attempts)))),
  },
  {
    title: "Tokens of ended calls per second",
    lines: [(second) => number(second.promptTokens) + number(second.completionTokens)],
    told: (minute) =>
      short(
        mean(
          minute.map((second) => number(second.promptTokens) + number(second.completionTokens)),
        ),
      ),
  },
];

// Text only ever goes in as text: names are others' words.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function path(values, most, name) {
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", "path");
  let text = "";
  let pen = false; // whether the line goes on from the value before
  values.forEach((value, i) => {
    if (value === null) {
      pen = false;
      return;
    }
    const x = KEPT - values.length + i;
    const y = 100 - (value / most) * 96;
    const at = `${x} ${y.toFixed(2)}`;
    text += pen ? `L${at}` : `M${at}L${at}`; // a lone value is a dot
    pen = true;
  });
  drawn.setAttribute("d", text);
  drawn.setAttribute("class", name);
  return drawn;
}

function draw(plot) {
  const values = plot.lines.map((line) => seconds.map(line));
  const most = Math.max(1, ...values.flat().filter((each) => each !== null));
  const told = plot.told(seconds.slice(-MINUTE));
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${KEPT} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${plot.title}: ${told}; at most ${short(most)}`);
  values.forEach((each, i) => {
    svg.append(path(each, most, i ? "second" : "first"));
  });
  return element(
    "figure",
    {},
    element("figcaption", {}, plot.title, element("b", {}, told)),
    svg,
    element(
      "div",
      { class: "axis" },
      ...["5 min ago", `highest ${short(most)}`, "now"].map((text) => element("span", {}, text)),
    ),
  );
}

function span(duration) {
  const whole = Math.round(Number.parseFloat(duration));
  if (whole < 120) return `${whole} s`;
  if (whole < 7200) return `${Math.floor(whole / 60)} min`;
  if (whole < 172_800) return `${Math.floor(whole / 3600)} h`;
  return `${Math.floor(whole / 86_400)} d`;
}

const word = (name, prefix) => name.replace(prefix, "").toLowerCase();

function closed(closure) {
  const scope = word(closure.scope, "CLOSURE_SCOPE_").replace("_model", "").replace("group", "quota group");
  const model = closure.model ? `, for ${closure.model}` : "";
  const wait = closure.opensIn && Number.parseFloat(closure.opensIn) > 0;
  const until = wait ? ` for ${span(closure.opensIn)}` : "";
  const state = word(closure.state, "KEY_STATE_").replace("_", " ");
  return `${state}${until}: the ${scope}${model} (${closure.fault || "unknown"})`;
}

const COLUMNS = ["Key", "State", "Running", "Attempts", "Answered", "Faults", "Tokens", "Why"];
const NUMBERS = new Set(["Running", "Attempts", "Answered", "Tokens"]);

function row(key) {
  const counts = key.counters;
  const state = word(key.state, "KEY_STATE_");
  const cells = [
    key.id,
    state.replace("_", " "),
    String(key.inFlight),
    short(number(counts.attempts)),
    short(number(counts.successes)),
    counts.faults.map((each) => `${each.fault} ${each.count}`).join(", ") || "none",
    short(number(counts.promptTokens) + number(counts.completionTokens)),
    key.closures.map(closed).join("; "),
  ];
  const classes = cells.map((_, i) => (NUMBERS.has(COLUMNS[i]) ? "number" : ""));
  classes[1] = state;
  classes[7] = "why";
  return element("tr", {}, ...cells.map((cell, i) => element("td", { class: classes[i] }, cell)));
}

function upstream(each) {
  const head = COLUMNS.map((name) =>
    element("th", { scope: "col", class: NUMBERS.has(name) ? "number" : "" }, name),
  );
  return [
    element("h2", {}, each.name),
    element(
      "p",
      {},
      `${each.inFlight} of ${each.slots} slots, ${each.queued} queued, ` +
        `${each.waiting} waiting for a key`,
    ),
    ...each.closures.map((closure) => element("p", { class: "lost" }, closed(closure))),
    element(
      "div",
      { class: "scroll" },
      element(
        "table",
        {},
        element("thead", {}, element("tr", {}, ...head)),
        element("tbody", {}, ...each.keys.map(row)),
      ),
    ),
  ];
}

function failures() {
  const counts = new Map();
  for (const second of seconds.slice(-MINUTE)) {
    for (const each of second.failed) {
      counts.set(each.reason, (counts.get(each.reason) ?? 0) + number(each.count));
    }
  }
  if (!counts.size) return [];
  const told = [...counts].sort((a, b) => b[1] - a[1]).map(([reason, n]) => `${reason} ${n}`);
  return [element("p", { class: "lost" }, `Failed in the last minute: ${told.join(", ")}`)];
}

// As `keytable.configuration` says it at a terminal.
function configuration(gateway) {
  const { configGeneration, configProblem } = gateway;
  if (configProblem) {
    const [first, ...rest] = configProblem.split("\n");
    const more = rest.length ? ` (and ${rest.length} more)` : "";
    const told = `Configuration ${configGeneration} stays in force, its file is refused: ${first}${more}`;
    return [element("p", { class: "lost" }, told)];
  }
  return number(configGeneration) > 1 ? [element("p", {}, `Configuration ${configGeneration}`)] : [];
}

function show(status) {
  const { gateway, upstreams, keyFiles } = status.listing;
  document.getElementById("gateway").textContent =
    `${gateway.version}, up ${span(gateway.uptime)}${gateway.draining ? ", draining" : ""}: ` +
    `${gateway.inFlight} of ${gateway.slots} slots, ${gateway.queued} queued, ` +
    `retry budget ${short(gateway.retryBudget)}`;
  document.getElementById("gateway").classList.remove("lost");
  document.getElementById("plots").replaceChildren(...plots.map(draw));
  document.getElementById("failures").replaceChildren(...failures());
  const broken = keyFiles.filter((file) => file.problem);
  document.getElementById("upstreams").replaceChildren(
    ...configuration(gateway),
    ...broken.map((file) =>
      element("p", { class: "lost" }, `Key file ${file.path}: ${file.problem}; its last good keys stay`),
    ),
    ...upstreams.flatMap(upstream),
  );
}

async function ask() {
  try {
    const answer = await fetch(`/status.json?since=${next}`, { signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(await answer.text());
    const status = await answer.json();
    const up = Number.parseFloat(status.listing.gateway.uptime);
    if (up + 1 < next) {
      // Another gateway than before answers: its seconds begin anew.
      seconds = [];
      next = 0;
      return ask();
    }
    seconds = [...seconds, ...status.seconds].slice(-KEPT);
    if (seconds.length) next = number(seconds.at(-1).number) + 1;
    show(status);
  } catch (error) {
    const told = document.getElementById("gateway");
    told.textContent = `The gateway does not answer (${error.message}). What follows is old.`;
    told.classList.add("lost");
  }
  setTimeout(ask, 1000);
}

ask();
