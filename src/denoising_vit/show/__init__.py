"""Feature maps of photos in shared colours: sheets, videos, HTML pages and the browser app."""
