// The laboratory: gradient descent on FG's two-block model, in the page. It needs no server and loads nothing: the page
// holds its numbers. The mathematics mirrors eos_utils/fg_blocks.py, and a browser test compares the two.
(() => {
  "use strict";

  class Blocks {
    // y: labels; start: {w: rows of n weights, a: output weights}; q: step size times ‖d₊‖; width: neurons taken.
    constructor(y, start, q, width) {
      this.y = y;
      this.n = y.length;
      this.w = start.w.slice(0, width).map((row) => row.slice());
      this.a = start.a.slice(0, width);
      this.eta = q / Math.sqrt(y.reduce((s, v) => s + (v > 0 ? v * v : 0), 0) / this.n ** 2);
    }

    errors() {
      const e = this.y.map((y) => y / this.n);
      this.w.forEach((row, j) => row.forEach((w, k) => w > 0 && (e[k] -= (this.a[j] * w) / this.n)));
      return e;
    }

    loss() {
      return (this.errors().reduce((s, e) => s + e * e, 0) * this.n) / 2;
    }

    step() {
      const e = this.errors();
      this.w.forEach((row, j) => {
        const a = this.a[j];
        let moved = 0;
        row.forEach((w, k) => {
          if (w <= 0) return;
          moved += w * e[k];
          row[k] = w + this.eta * a * e[k];
        });
        this.a[j] = a + this.eta * moved;
      });
    }

    // Largest eigenvalue of the Hessian's block of neurons with sign·a > 0: Lanczos with full reorthogonalisation.
    top(sign, depth = 40) {
      const who = this.a.map((a, j) => (sign * a > 0 ? j : -1)).filter((j) => j >= 0);
      const { n } = this;
      const size = who.length * (n + 1);
      if (!size) return 0;
      const e = this.errors();
      const apply = (v) => {
        const dh = new Float64Array(n);
        const out = new Float64Array(size);
        who.forEach((j, i) => {
          const at = i * (n + 1);
          for (let k = 0; k < n; k++) if (this.w[j][k] > 0) dh[k] += this.a[j] * v[at + k] + this.w[j][k] * v[at + n];
        });
        who.forEach((j, i) => {
          const at = i * (n + 1);
          for (let k = 0; k < n; k++) {
            const w = this.w[j][k];
            if (w <= 0) continue;
            out[at + k] = (this.a[j] * dh[k]) / n - e[k] * v[at + n];
            out[at + n] += (w * dh[k]) / n - e[k] * v[at + k];
          }
        });
        return out;
      };
      const dot = (u, v) => u.reduce((s, x, i) => s + x * v[i], 0);
      let v = Float64Array.from({ length: size }, (_, i) => Math.sin(1 + 1.7 * i) + 0.3 * Math.cos(3.1 * i));
      let norm = Math.sqrt(dot(v, v));
      v = v.map((x) => x / norm);
      const basis = [];
      const alpha = [];
      const beta = [];
      while (basis.length < Math.min(depth, size)) {
        const u = apply(v);
        basis.push(v);
        alpha.push(dot(u, v));
        for (let pass = 0; pass < 2; pass++)
          for (const b of basis) {
            const c = dot(u, b);
            for (let i = 0; i < size; i++) u[i] -= c * b[i];
          }
        norm = Math.sqrt(dot(u, u));
        if (!(norm > 1e-13 * (Math.abs(alpha[0]) + 1e-300))) break;
        beta.push(norm);
        v = u.map((x) => x / norm);
      }
      return largest(alpha, beta);
    }
  }

  // Largest eigenvalue of a symmetric tridiagonal matrix, by bisection with Sturm counts.
  function largest(alpha, beta) {
    const m = alpha.length;
    const bound = Math.max(...alpha.map((a, i) => Math.abs(a) + (beta[i - 1] ?? 0) + (i < m - 1 ? beta[i] : 0)));
    const above = (x) => {
      let d = 1;
      let count = 0;
      for (let i = 0; i < m; i++) {
        d = alpha[i] - x - (i ? beta[i - 1] ** 2 / d : 0);
        if (d === 0) d = 1e-300;
        if (d > 0) count++;
      }
      return count;
    };
    let low = -bound;
    let high = bound;
    for (let i = 0; i < 80; i++) {
      const middle = (low + high) / 2;
      if (above(middle) > 0) low = middle;
      else high = middle;
    }
    return (low + high) / 2;
  }

  // ---- drawing ------------------------------------------------------------------------------------

  const SVG = "http://www.w3.org/2000/svg";
  const make = (parent, name, attributes = {}, text = "") => {
    const found = document.createElementNS(SVG, name);
    for (const [k, v] of Object.entries(attributes)) found.setAttribute(k, v);
    found.textContent = text;
    parent.append(found);
    return found;
  };
  const FRAME = { width: 560, height: 200, left: 52, right: 12, top: 14, bottom: 30 };

  class Plot {
    constructor(host, title, labels, log = false) {
      const label = `${title}, over the step: a live picture; the numbers are in the line below the buttons`;
      this.svg = make(host, "svg", { viewBox: `0 0 ${FRAME.width} ${FRAME.height}`, role: "img", "aria-label": label });
      this.log = log;
      this.grid = make(this.svg, "g", { class: "lab-grid" });
      this.lines = labels.map((_, i) => make(this.svg, "polyline", { class: `lab-line lab-line-${i}` }));
      this.edge = make(this.svg, "line", { class: "lab-edge" });
      make(this.svg, "text", { x: 4, y: 11, class: "lab-title" }, title);
      labels.forEach((text, i) => {
        make(this.svg, "text", { x: FRAME.width - 150 + 55 * i, y: 11, class: `lab-key lab-key-${i}` }, text);
      });
    }

    draw(series, steps, low, high, edge) {
      const scale = this.log ? Math.log10 : (v) => v;
      const [b, t] = [scale(low), scale(high)];
      const x = (i) => FRAME.left + ((FRAME.width - FRAME.left - FRAME.right) * i) / steps;
      const y = (v) => {
        const u = (Math.min(Math.max(scale(v), b), t) - b) / (t - b);
        return FRAME.height - FRAME.bottom - (FRAME.height - FRAME.top - FRAME.bottom) * (Number.isFinite(u) ? u : 1);
      };
      this.grid.replaceChildren();
      const ticks = this.log
        ? Array.from({ length: Math.floor((t - b) / 4) + 1 }, (_, i) => 10 ** (Math.ceil(b) + 4 * i))
        : Array.from({ length: Math.floor(high / 0.5) + 1 }, (_, i) => 0.5 * i);
      for (const v of ticks) {
        make(this.grid, "line", { x1: FRAME.left, x2: FRAME.width - FRAME.right, y1: y(v), y2: y(v) });
        const text = this.log ? `1e${Math.round(Math.log10(v))}` : v.toFixed(1);
        make(this.grid, "text", { x: FRAME.left - 6, y: y(v) + 4, "text-anchor": "end" }, text);
      }
      for (let i = 0; i <= 4; i++) {
        const step = Math.round((steps * i) / 4);
        make(this.grid, "text", { x: x(step), y: FRAME.height - 10, "text-anchor": "middle" }, i ? `${step}` : "step 0");
      }
      if (edge) {
        for (const [k, v] of Object.entries({ x1: FRAME.left, x2: FRAME.width - FRAME.right, y1: y(edge), y2: y(edge) }))
          this.edge.setAttribute(k, v);
        make(this.grid, "text", { x: FRAME.width - FRAME.right, y: y(edge) - 4, "text-anchor": "end" }, "2/η");
      }
      series.forEach((values, i) => {
        this.lines[i].setAttribute("points", values.map((v, s) => `${x(s).toFixed(1)},${y(v).toFixed(1)}`).join(" "));
      });
    }
  }

  class Neurons {
    constructor(host) {
      const label = "Each neuron's input weights along the positive and along the negative labels: a live picture";
      this.svg = make(host, "svg", { viewBox: "0 0 280 230", role: "img", "aria-label": label });
      make(this.svg, "text", { x: 4, y: 11, class: "lab-title" }, "neurons");
      make(this.svg, "line", { x1: 30, x2: 270, y1: 200, y2: 200, class: "lab-axis" });
      make(this.svg, "line", { x1: 30, x2: 30, y1: 24, y2: 200, class: "lab-axis" });
      make(this.svg, "text", { x: 270, y: 218, "text-anchor": "end" }, "along the positive labels");
      make(this.svg, "text", { x: 36, y: 32 }, "along the negative ones");
      this.dots = make(this.svg, "g");
    }

    draw(model, reach) {
      const unit = (sign) => {
        const part = model.y.map((y) => (y * sign > 0 ? Math.abs(y) : 0));
        const norm = Math.hypot(...part);
        return part.map((v) => v / norm);
      };
      const [p, m] = [unit(1), unit(-1)];
      const along = (row, u) => row.reduce((s, w, k) => s + Math.max(w, 0) * u[k], 0);
      this.dots.replaceChildren();
      model.w.forEach((row, j) => {
        const cx = 30 + (236 * Math.min(along(row, p), reach)) / reach;
        const cy = 200 - (170 * Math.min(along(row, m), reach)) / reach;
        const r = 1.5 + 5 * Math.min(Math.abs(model.a[j]) / reach, 1);
        make(this.dots, "circle", { cx, cy, r, class: model.a[j] > 0 ? "lab-plus" : "lab-minus" });
      });
    }
  }

  // ---- the page -----------------------------------------------------------------------------------

  function control(form, name, title, attributes, written) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    const shown = document.createElement("output");
    input.type = "range";
    input.name = name;
    const { value, ...range } = attributes;
    for (const [k, v] of Object.entries(range)) input.setAttribute(k, v);
    input.value = value; // last: it is rounded to the steps of the range as it is set
    label.append(title, input, shown);
    const tell = () => (shown.textContent = written(Number(input.value)));
    input.addEventListener("input", tell);
    tell();
    form.append(label);
    return input;
  }

  function start(host) {
    const given = JSON.parse(host.querySelector("script").textContent);
    const form = document.createElement("form");
    form.className = "lab-controls";
    form.setAttribute("aria-label", "Settings of the model");
    // Not named q: Sphinx's search writes into every field of that name.
    const q = control(form, "step-size", "step size q₊ = η‖d₊‖", { min: 0.3, max: 1.7, step: 0.01, value: given.q }, (v) => v.toFixed(2));
    const ratio = control(form, "ratio", "negative labels over positive ones", { min: 0.2, max: 1, step: 0.05, value: given.ratio }, (v) => v.toFixed(2));
    const width = control(form, "width", "neurons", { min: 4, max: given.starts[0].a.length, step: 1, value: given.width }, String);
    const which = control(form, "start", "initialisation", { min: 1, max: given.starts.length, step: 1, value: 1 }, String);
    const button = (text, act) => {
      const found = document.createElement("button");
      found.type = "button";
      found.textContent = text;
      found.addEventListener("click", act);
      form.append(found);
      return found;
    };
    const toggle = button("Run", () => (running ? pause() : run()));
    button("One step", () => {
      pause();
      advance(1);
    });
    button("Back to the start", reset);
    const told = document.createElement("p");
    told.className = "lab-told";
    told.setAttribute("role", "status");
    const pictures = document.createElement("div");
    pictures.className = "lab-pictures";
    host.append(form, told, pictures);
    const tops = new Plot(pictures, "sharpness of the two blocks · η/2", ["λ₊", "λ₋"]);
    const losses = new Plot(pictures, "loss", ["loss"], true);
    const neurons = new Neurons(pictures);
    let model, series, running, frame;

    function measure() {
      series.plus.push((model.top(1) * model.eta) / 2);
      series.minus.push((model.top(-1) * model.eta) / 2);
      series.loss.push(model.loss());
    }

    function reset() {
      pause();
      const y = given.labels.map((v) => (v > 0 ? 1 : -Number(ratio.value)));
      model = new Blocks(y, given.starts[Number(which.value) - 1], Number(q.value), Number(width.value));
      series = { plus: [], minus: [], loss: [] };
      measure();
      draw();
    }

    function advance(steps) {
      for (let i = 0; i < steps && series.loss.length <= given.steps; i++) {
        model.step();
        measure();
      }
      draw();
      if (series.loss.length > given.steps) pause();
    }

    function draw() {
      const last = series.loss.length - 1;
      const high = Math.max(1.6, ...series.plus, ...series.minus);
      tops.draw([series.plus, series.minus], given.steps, 0, Math.min(high * 1.05, 4), 1);
      losses.draw([series.loss], given.steps, 1e-16, 10, 0);
      neurons.draw(model, 1.6 * Math.sqrt(Math.max(...model.y)));
      const two = (v) => v.toFixed(2);
      told.textContent =
        `Step ${last}: λ₊ = ${two(series.plus[last])}, λ₋ = ${two(series.minus[last])} of 2/η, ` +
        `loss ${series.loss[last].toExponential(2)}.`;
      host.dataset.series = JSON.stringify(series);
    }

    function run() {
      if (series.loss.length > given.steps) reset();
      running = true;
      toggle.textContent = "Pause";
      const tick = () => {
        if (!running) return;
        advance(2);
        if (running) frame = requestAnimationFrame(tick);
      };
      frame = requestAnimationFrame(tick);
    }

    function pause() {
      running = false;
      cancelAnimationFrame(frame);
      toggle.textContent = "Run";
    }

    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", reset);
    reset();
    advance(60);
  }

  document.querySelectorAll("[data-eos-lab]").forEach(start);
})();
