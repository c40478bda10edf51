// Every text on the page whose colour is too near that of what lies behind it (WCAG 2.2, 1.4.3), SVG included.
(least) => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parse = (colour) => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = colour;
    paint.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = paint.getImageData(0, 0, 1, 1).data;
    return [red, green, blue, alpha / 255];
  };
  const over = (front, back) => [0, 1, 2].map((i) => front[i] * front[3] + back[i] * (1 - front[3])).concat(1);
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((back, front) => over(front, back), [255, 255, 255, 1]);
  };
  const light = ([red, green, blue]) => {
    const linear = [red, green, blue].map((value) => value / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const found = { texts: 0, pale: [] };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("style, title, defs") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), back = behind(element);
    const front = over(parse(element instanceof SVGElement ? style.fill : style.color), back);
    const [more, less] = [light(front), light(back)].sort((one, other) => other - one);
    const ratio = (more + 0.05) / (less + 0.05);
    found.texts += 1;
    if (ratio < least) found.pale.push(`${ratio.toFixed(2)}: ${node.data.trim().slice(0, 40)}`);
  }
  return found;
}
