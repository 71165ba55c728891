"""Feature forecasting: what stands in for the work of a skipped step."""

from dit_accel.forecast.settings import Forecast as Forecast
