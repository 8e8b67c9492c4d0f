// A browser lets a page from a folder read no other page, so there the search shows titles alone, and no error.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
