// What is wrong with the page that is open: a list of sentences.
() => {
  const faults = [];
  const content = document.querySelector('.md-content');
  const levels = [...content.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(each => +each.tagName[1]);
  if (levels.filter(level => level === 1).length !== 1) faults.push('not one title, but ' + levels.filter(l => l === 1).length);
  levels.forEach((level, index) => {
    if (index && level > levels[index - 1] + 1) faults.push('a heading skips from ' + levels[index - 1] + ' to ' + level);
  });
  for (const image of content.querySelectorAll('img')) if (!image.alt) faults.push('no alt text: ' + image.src.slice(0, 80));
  for (const image of content.querySelectorAll('svg[role=img]')) if (!image.querySelector('title')) faults.push('no title: svg');
  if (document.documentElement.scrollWidth > window.innerWidth + 1) faults.push('wider than the screen: ' + document.documentElement.scrollWidth);
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = text => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = element => {
    const stack = [];
    for (let each = element; each; each = each.parentElement) stack.push(rgba(getComputedStyle(each).backgroundColor));
    return stack.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const light = color => {
    const [r, g, b] = color.slice(0, 3).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const seen = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height || ['SCRIPT', 'STYLE', 'NOSCRIPT', 'TITLE', 'DESC'].includes(element.tagName)) continue;
    if (element.closest('.headerlink, .md-skip, [data-md-component=search], .md-top, .md-clipboard')) continue;
    const style = getComputedStyle(element), ground = behind(element);
    const color = over(rgba(element.closest('svg') ? style.fill : style.color), ground);
    const [one, other] = [light(color), light(ground)];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const key = [element.tagName, element.className, ratio.toFixed(2)].join(' ');
    if (ratio < (large ? 3 : 4.5) && !seen.has(key)) {
      seen.add(key);
      faults.push('contrast ' + ratio.toFixed(2) + ': ' + element.tagName + '.' + element.className + ' ' + walker.currentNode.textContent.trim().slice(0, 40));
    }
  }
  return faults;
}
