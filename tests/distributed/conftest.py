"""That pytest finds this file lets the tests in `strategies/` import the modules beside it."""
