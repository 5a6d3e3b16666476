// A sentence that somebody should read must be seen, also by who has scrolled down and pasted a picture.
watch('value', () => element.querySelector('p')?.scrollIntoView({block: 'nearest'}));
