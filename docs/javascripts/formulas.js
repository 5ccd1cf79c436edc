// MathJax 3.2.2 (Apache-2.0) from this site, two megabytes, and only where a page has formulas.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
};
if (document.querySelector(".arithmatex")) {
  const script = document.createElement("script");
  script.src = new URL("mathjax/tex-svg.js", document.currentScript.src);
  document.head.append(script);
}
