// Clicks on images and buttons. The content is replaced as a whole, so the listeners are on what stays.
let seen = null;
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.dataset.id) trigger('picked', {id: Number(button.dataset.id)});
  if (button.dataset.do === 'back') trigger('back', {});
  if (button.dataset.do === 'browse') {
    const field = element.querySelector('#find-name');
    trigger('browse', {text: field ? field.value : '', page: Number(button.dataset.page || 0)});
  }
});
element.addEventListener('submit', (event) => {
  event.preventDefault();
  trigger('browse', {text: element.querySelector('#find-name').value, page: 0});
});
// after another query the keyboard and the view go to the new list; a filter leaves them where they are
watch('value', () => {
  const section = element.querySelector('section');
  if (!section || section.dataset.query === seen) return;
  const first = seen === null;
  seen = section.dataset.query;
  if (!first) section.querySelector('h2').focus();
});
seen = element.querySelector('section')?.dataset.query ?? null;
