
"use strict"
const data = JSON.parse(document.getElementById("data").textContent)
const root = document.getElementById("page")
const dark = matchMedia("(prefers-color-scheme: dark)")
const LIGHT = ["#2b6cb0", "#d9480f", "#2f9e44", "#9c36b5", "#0b7285", "#c2255c", "#846100", "#495057"]
const DARK = ["#74b3f0", "#ff9f68", "#69db7c", "#da9af0", "#5fc9d8", "#f783ac", "#e0bf5a", "#adb5bd"]
const colour = index => (dark.matches ? DARK : LIGHT)[index % LIGHT.length]
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()
const charts = []
let axis = "step"
let zoom = null  // [low, high] on the chosen axis, shared by all charts

/* An element with attributes and children. Texts become text nodes only: nothing in the data is read as HTML. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(made.style, value)
    else if (name.startsWith("on")) made[name] = value
    else made.setAttribute(name, value)
  }
  made.append(...children)
  return made
}
const svg = (tag, attributes, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag)
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value)
  made.append(...children)
  return made
}
const table = (head, rows, kind = "") => el("div", {class: "scroll"}, el("table", {class: kind},
  ...(head.length ? [el("tr", {}, ...head.map(text => el("th", {}, text)))] : []),
  ...rows.map(row => el("tr", {}, ...row.map((cell, i) => el(i ? "td" : "th", {}, cell))))))

/* Steps -> values on the chosen axis; between two recorded steps in a straight line. */
function onAxis(run, steps) {
  const {steps: known, [axis]: values} = data.runs[run].progress
  if (axis === "step" || !known.length) return steps
  let at = 0
  return steps.map(step => {
    while (at < known.length && known[at] < step) at++
    if (at === known.length) return values[at - 1]
    if (known[at] === step) return values[at]
    const [s0, v0] = at ? [known[at - 1], values[at - 1]] : [0, 0]
    return v0 + (values[at] - v0) * (step - s0) / (known[at] - s0)
  })
}
const WHOLE = [...Array(13).keys()].flatMap(power => [1, 2, 5].map(n => n * 10 ** power))  // between marks of an axis of steps
const AXES = {step: "step", tokens: "tokens", hours: "hours of training"}
const short = value => value == null ? "" : Math.abs(value) >= 1e4
  ? Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 3}).format(value)
  : Number(value.toPrecision(5)).toString()

/* One chart of one or several runs. Curves of a run that has one curve have the run's colour. */
class Chart {
  constructor(spec, several) {
    this.spec = spec
    this.several = several
    this.isLog = false
    this.body = el("div")
    const head = el("div", {class: "head"}, el("h3", {}, spec.title + (spec.unit ? `, ${spec.unit}` : "")))
    if (spec.log) {
      const button = el("button", {type: "button", title: "logarithmic scale", onclick: () => {
        this.isLog = !this.isLog
        button.textContent = this.isLog ? "linear" : "log"
        this.draw()
      }}, "log")
      head.append(button)
    }
    this.panel = el("section", {class: "panel"}, head, this.body)
    charts.push(this)
  }
  curves() {
    const found = []
    this.spec.runs.forEach((curves, run) => curves.forEach((curve, place) => {
      const name = [this.several ? data.runs[run].name : "", curve.label].filter(Boolean).join(": ") || this.spec.title
      const index = this.several ? run : curves.some(c => c.faint) ? 0 : place
      found.push({...curve, run, name, colour: colour(index), dash: this.several && place && !curves[0].faint ? [2 + 3 * place, 4] : []})
    }))
    return found
  }
  draw() {
    this.plot?.destroy()
    const curves = this.curves(), tables = [], series = [{label: AXES[axis], value: (u, v) => short(v)}], bands = []
    for (const c of curves) {
      const columns = [onAxis(c.run, c.steps), c.values]
      const at = series.length
      series.push({label: c.name, stroke: c.faint ? c.colour + "66" : c.colour, width: c.faint ? 1 : 1.75, dash: c.dash,
        points: {show: c.points || c.steps.length < 3, size: 5}, spanGaps: true, value: (u, v) => short(v)})
      if (c.low) {
        columns.push(c.low, c.high)
        for (const edge of ["low", "high"])
          series.push({label: `${c.name} (${edge})`, stroke: c.colour + "00", width: 0, points: {show: false}, spanGaps: true, isBand: true})
        bands.push({series: [at + 2, at + 1], fill: c.colour + "2a"})
      }
      tables.push(columns)
    }
    const values = uPlot.join(tables)
    const line = {stroke: css("--muted"), grid: {stroke: css("--line"), width: 1}, ticks: {stroke: css("--line"), width: 1}}
    const isLog = this.isLog && values.slice(1).some(column => column.some(v => v > 0))
    if (isLog) for (const column of values.slice(1)) column.forEach((v, i) => { if (!(v > 0)) column[i] = null })
    const y = isLog ? {distr: 3} : this.spec.zero ? {range: (u, low, high) => [Math.min(0, low ?? 0), (high ?? 1) * 1.05 || 1]} : {}
    this.plot = new uPlot({
      width: Math.max(240, this.body.clientWidth), height: 260, series, bands, tzDate: null,
      scales: {x: {time: false, ...(zoom ? {min: zoom[0], max: zoom[1]} : {})}, y},
      axes: [{...line, values: (u, all) => all.map(short), ...(axis === "step" ? {incrs: WHOLE} : {})}, {...line, size: 74, values: (u, all) => all.map(short)}],
      cursor: {sync: {key: "report"}, drag: {x: true, y: false}},
      legend: {live: true},
      hooks: {setSelect: [u => this.select(u)]},
    }, values, this.body)
    if (zoom) this.plot.setScale("x", {min: zoom[0], max: zoom[1]})
    series.forEach((s, i) => { if (s.isBand) this.body.querySelectorAll(".u-series")[i].style.display = "none" })
    this.plot.over.ondblclick = () => setZoom(null)
  }
  select(u) {
    if (u.select.width > 2) setZoom([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")])
  }
  zoomTo() {
    if (!this.plot) return
    const x = this.plot.data[0]
    this.plot.setScale("x", zoom ? {min: zoom[0], max: zoom[1]} : {min: x[0] ?? 0, max: x[x.length - 1] ?? 1})
  }
}
function setZoom(range) {
  zoom = range
  charts.forEach(chart => chart.zoomTo())
}

const KINDS = ["evaluating", "saving", "writing samples", "scoring tasks", "waiting for data", "starting", "loading", "staging",
  "waiting for copies", "going back"]
const LOST = ["lost work", "detecting a failure", "queue or back-off", "stopped"]
const kindColour = kind => {
  if (kind === "training") return css("--good")
  if (LOST.includes(kind)) return css("--bad") + ["99", "cc", "66", ""][LOST.indexOf(kind)]
  if (!KINDS.includes(kind)) return css("--muted")
  const at = KINDS.indexOf(kind)  // not green, which is training; a second round is paler
  return colour([1, 3, 0, 4, 5, 6, 7][at % 7]) + (at < 7 ? "" : "77")
}
function timeline(run) {
  const {shares, marks, start, seconds} = run.timeline
  if (!shares) return []
  const kinds = Object.keys(run.seconds), whole = Object.values(run.seconds).reduce((a, b) => a + b, 0)
  const columns = Object.values(shares)[0].length, floor = new Array(columns).fill(0)
  const picture = svg("svg", {viewBox: `0 0 ${columns} 100`, preserveAspectRatio: "none", role: "img"})
  for (const kind of kinds) {
    if (!shares[kind]) continue
    shares[kind].forEach((share, i) => {
      if (share > 0.0005) picture.append(svg("rect", {x: i, width: 1.02, y: 82 * (1 - floor[i] - share), height: 82 * share, fill: kindColour(kind)},
        svg("title", {}, `${kind}: ${Math.round(100 * share)} % of ${(seconds / columns).toPrecision(3)} s`)))
      floor[i] += share
    })
  }
  for (const [at, kind, step] of marks) {
    const x = at * columns, half = Math.max(0.15, columns / 900)
    picture.append(svg("rect", {x: x - half, width: 2 * half, y: 85, height: 15, fill: kind === "save" ? css("--accent") : css("--bad")},
      svg("title", {}, kind === "save" ? `checkpoint of step ${step}` : `resumed after step ${step}`)))
  }
  const rows = kinds.map(kind => [el("span", {}, el("span", {class: "swatch", style: {background: kindColour(kind)}}), kind),
    short(run.seconds[kind]) + " s", (100 * run.seconds[kind] / whole).toFixed(1) + " %"])
  return [el("p", {class: "muted"}, `Wall time from ${start}. Below the bar: checkpoints (blue), resumes (red).`), picture, table([], rows)]
}
function precision(run) {
  const {steps, rows, floor, scaling} = run.precision
  if (!steps) return []
  const operands = [...new Set(rows.map(row => row[1]))], layers = [...new Set(rows.map(row => row[0]))]
  const find = new Map(rows.map(row => [row[0] + "\n" + row[1], row[2]]))
  const label = el("span", {class: "muted"}), body = el("div", {class: "scroll"})
  const show = at => {
    label.textContent = ` step ${steps[at]} of ${scaling}; red: near or below the limit of ${floor} dB`
    body.replaceChildren(el("table", {class: "heat"},
      el("tr", {}, el("th", {}, "layer"), ...operands.map(name => el("th", {}, name))),
      ...layers.map(layer => el("tr", {}, el("th", {}, layer), ...operands.map(operand => {
        const value = find.get(layer + "\n" + operand)?.[at]
        if (value == null) return el("td", {}, "")
        const good = Math.max(0, Math.min(1, (value - floor) / 20))
        return el("td", {class: "cell", style: {background: `hsl(${Math.round(8 + 120 * good)} 60% 70%)`}}, value.toFixed(1))
      })))))
  }
  const slider = el("input", {type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": "measured step",
    oninput: () => show(Number(slider.value))})
  show(steps.length - 1)
  return [el("p", {class: "muted"}, "Signal over quantisation noise of every operand, dB."), el("div", {}, slider, label), body]
}
function dataTable(run) {
  if (run.data.note) return [el("p", {class: "muted"}, run.data.note)]
  return [table(["source", "wanted share", "drawn share", "rows drawn", "epochs"], run.data.rows)]
}
const samples = run => run.samples.map(({title, text}, i) => el("details", i ? {} : {open: ""}, el("summary", {}, title), el("pre", {}, text)))
/* What the model wrote at each evaluation: one step at a time, leafed through with buttons, the slider or its arrow keys. */
function continued(run) {
  const all = run.continued
  if (!all.length) return []
  const label = el("span", {class: "muted"}), body = el("div")
  const slider = el("input", {type: "range", min: 0, max: all.length - 1, value: all.length - 1, "aria-label": "step of the samples",
    oninput: () => show(Number(slider.value))})
  const turn = (text, title, by) => el("button", {type: "button", title, "aria-label": title, onclick: () => {
    slider.value = Number(slider.value) + by
    show(Number(slider.value))
  }}, text)
  function show(at) {
    label.textContent = `step ${all[at].step.toLocaleString("en")} (${at + 1} of ${all.length})`
    body.replaceChildren(...all[at].texts.map(([prompt, text]) =>
      el("pre", {class: "panel"}, el("span", {class: "muted"}, prompt), text)))
  }
  show(all.length - 1)
  return [el("p", {class: "muted"}, "What the model wrote after each prompt (grey) of evaluate.sample_prompts."),
    el("div", {class: "leaf"}, turn("\u25c0", "earlier", -1), slider, turn("\u25b6", "later", 1), label), body]
}
const facts = run => [
  ...(run.planned.length ? [el("h3", {}, "Planned and measured"), table(["", "planned", "measured"], run.planned)] : []),
  table([], Object.entries(run.facts)),
]

function build() {
  const several = data.runs.length > 1
  document.title = data.runs.map(run => run.name).join(", ")
  const sections = []
  const add = (name, parts) => { if (parts.length) sections.push([name, parts]) }
  const each = make => data.runs.flatMap((run, i) => {
    const parts = make(run)
    return parts.length && several ? [el("h3", {}, el("span", {class: "swatch", style: {background: colour(i)}}), run.name), ...parts] : parts
  })
  if (several) add("Differences", [data.differences.length
    ? table(["field", ...data.runs.map(run => run.name)], data.differences) : el("p", {}, "The recipes are equal.")])
  for (const [name, specs] of Object.entries(data.charts))
    add(name, [el("div", {class: "grid"}, ...specs.map(spec => new Chart(spec, several).panel))])
  add("Time", each(timeline))
  add("Low precision", each(precision))
  add("Profile", each(run => run.profile.length ? [
    el("p", {class: "muted"}, "The operations that took longest. Open the trace in the run's folder profile/ at ui.perfetto.dev."),
    table(["trace", "operation", "calls", "ms", "share"], run.profile)] : []))
  add("Data", each(dataTable))
  add("Samples", each(run => [...continued(run), ...samples(run)]))
  add("Run", each(facts))
  add("Events", each(run => run.events.length ? [el("details", run.events.length < 12 ? {open: ""} : {},
    el("summary", {}, `${run.events.length} events`), table(["time", "event", "step", ""], run.events, "events"))] : []))
  add("Recipe", each(run => [el("details", {}, el("summary", {}, "the whole recipe"), el("pre", {}, run.recipe))]))

  const choose = el("select", {id: "axis", "aria-label": "horizontal axis", onchange: () => {
    axis = choose.value
    zoom = null
    charts.forEach(chart => chart.draw())
  }}, ...Object.entries(AXES).map(([value, text]) => el("option", {value}, text)))
  root.replaceChildren(
    el("header", {}, el("h1", {}, data.runs.map(run => run.name).join(" | ")),
      el("span", {class: "muted"}, several ? "" : `${data.runs[0].state}; `, `report written ${data.written}`)),
    ...data.runs.flatMap((run, i) => [
      ...(several ? [el("h3", {}, el("span", {class: "swatch", style: {background: colour(i)}}), `${run.name}: ${run.state}`)] : []),
      el("div", {class: "tiles"}, ...Object.entries(run.tiles).map(([name, value]) =>
        el("div", {class: "tile"}, el("span", {class: "muted"}, name), el("b", {}, value)))),
      ...(Object.keys(run.tiles).length ? [] : [el("p", {}, "No step is finished yet.")])]),
    el("nav", {}, ...sections.map(([name]) => el("a", {href: "#" + name.replaceAll(" ", "-")}, name)),
      el("span", {class: "right"}, choose, el("button", {type: "button", onclick: () => setZoom(null)}, "reset zoom"))),
    ...sections.flatMap(([name, parts]) => [el("h2", {id: name.replaceAll(" ", "-")}, name), ...parts]))
  charts.forEach(chart => chart.draw())
  new ResizeObserver(() => charts.forEach(chart => chart.plot?.setSize({width: Math.max(240, chart.body.clientWidth), height: 260}))).observe(root)
}
build()
dark.addEventListener("change", () => { charts.length = 0; build() })
