// Spreads the sections of a chapter over slides of one size (slides.css), in the browser, which alone knows how tall a formula is.
// What does not fit goes to a slide more under the same heading; a block that no slide holds is set smaller.

const STEP = 0.94; // of the size, each time a block is still too large
const SMALLEST = 0.5; // of a block that no slide would hold
const TOGETHER = 0.7; // of a figure, so that what it shows is said on the same slide
const NEARLY = 0.85; // of a slide, so that its last lines need no slide more

const tooWide = (box) => box.scrollWidth > box.clientWidth;
const overflows = (box) => tooWide(box) || box.scrollHeight > box.clientHeight;

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function setSize(part, scale) {
  part.style.fontSize = `${scale}em`;
  for (const picture of part.querySelectorAll("figure img")) picture.style.height = `${400 * scale}px`;
}

// Set a part of a slide's body smaller for as long as the body is too full, down to the smallest size.
function shrink(part, body, full, smallest = SMALLEST) {
  for (let scale = STEP; scale > smallest && full(body); scale *= STEP) setSize(part, scale);
}

function newSlide(group, part) {
  const heading = element("h2", { innerHTML: group.querySelector("h2").innerHTML });
  if (part > 1) heading.append(element("small", {}, ` (${part})`));
  const within = element("p", { innerHTML: group.querySelector("p").innerHTML });
  const body = element("div", { className: "body" });
  group.before(element("section", { className: "slide" }, element("header", {}, within, heading), body));
  for (let size = 32; tooWide(heading) && size > 16; size--) heading.style.fontSize = `${size}px`;
  return body;
}

// Returns the number of slides, and the numbers of those that hold more than fits.
function layOut() {
  for (const group of document.querySelectorAll(".group")) {
    let part = 1;
    let body = newSlide(group, part);
    const blocks = [...group.querySelectorAll(":scope > .block")];
    blocks.forEach((block, index) => {
      body.append(block);
      shrink(block.querySelector(".display, table, pre") ?? block, body, tooWide); // it needs no slide of its own
      if (overflows(body) && body.childElementCount > 1) {
        // A claim stays with the figure that shows it, and nothing stands on a slide more by itself if it can be helped.
        const before = block.previousElementSibling;
        const squeezed = block.matches(".claim") && before.querySelector("figure") ? before : body;
        if (squeezed === before) shrink(before, body, overflows, TOGETHER);
        else if (index === blocks.length - 1 && !block.querySelector("figure")) shrink(body, body, overflows, NEARLY);
        if (overflows(body)) {
          const left = body;
          body = newSlide(group, ++part);
          body.append(block);
          setSize(squeezed, 1);
          shrink(squeezed, left, overflows);
        }
      }
      shrink(block, body, overflows);
    });
    group.remove();
  }
  const first = document.querySelector(".title .body");
  shrink(first, first, overflows);
  const slides = [...document.querySelectorAll(".slide")];
  slides.forEach((slide, index) => {
    slide.append(element("footer", {}, element("span", {}, document.body.dataset.book), element("span", {}, `${index + 1} / ${slides.length}`)));
  });
  const full = slides.filter((slide) => overflows(slide) || overflows(slide.querySelector(".body")));
  return [slides.length, full.map((slide) => slides.indexOf(slide) + 1)];
}
