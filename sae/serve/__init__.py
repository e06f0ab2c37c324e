"""The report with its model beside it: the same static site, and a JSON API that encodes text and steers."""
