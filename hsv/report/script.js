// Reads a chart under the pointer: the legend shows the values of the nearest step.
for (const svg of document.querySelectorAll("svg[data-points]")) {
  const series = JSON.parse(svg.dataset.points);
  const figure = svg.closest("figure");
  const cursor = svg.querySelector(".cursor");
  const at = figure.querySelector(".at");
  const values = new Map([...figure.querySelectorAll("[data-series]")].map((b) => [b.dataset.series, b]));
  const last = new Map([...values].map(([name, b]) => [name, b.textContent]));
  svg.addEventListener("pointermove", (event) => {
    const x = (event.clientX - svg.getBoundingClientRect().left) * svg.viewBox.baseVal.width / svg.clientWidth;
    for (const [name, points] of Object.entries(series)) {
      const near = points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      values.get(name).textContent = near[2];
      at.textContent = "step " + near[1].toLocaleString("en");
      cursor.setAttribute("x1", near[0]);
      cursor.setAttribute("x2", near[0]);
    }
    cursor.style.opacity = 1;
  });
  svg.addEventListener("pointerleave", () => {
    for (const [name, text] of last) values.get(name).textContent = text;
    at.textContent = "";
    cursor.style.opacity = 0;
  });
}
