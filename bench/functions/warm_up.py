"""A small example of what `predict.py` does with its packages, for the zygote."""

import pandas
from sklearn.linear_model import LinearRegression

frame = pandas.DataFrame({"a": [1.0, 2.0]})
frame["b"] = LinearRegression().fit(frame[["a"]].to_numpy(), frame["a"]).predict(frame[["a"]].to_numpy())
frame["b"].round(3).tolist()
