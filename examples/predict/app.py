"""Tells the species of an iris from four measures, by a model that `train.py` made."""

import json
from pathlib import Path

import joblib
import pandas

MODEL = joblib.load(Path(__file__).with_name("model.joblib"))
MEASURES = list(MODEL.feature_names_in_)


def handler(event, context):
    try:
        flowers = json.loads(event["body"])
    except ValueError as error:
        return problem(f"the body is not JSON: {error}")
    single = isinstance(flowers, dict)
    rows = [flowers] if single else flowers
    if not isinstance(rows, list) or not rows or not all(is_flower(row) for row in rows):
        return problem(f"send an object, or a list of them, with the numbers {', '.join(MEASURES)} in centimetres")
    table = pandas.DataFrame(rows, columns=MEASURES, dtype=float)
    answers = [
        {
            "species": str(MODEL.classes_[chances.argmax()]),
            "probabilities": {
                str(name): round(float(chance), 4) for name, chance in zip(MODEL.classes_, chances, strict=True)
            },
        }
        for chances in MODEL.predict_proba(table)
    ]
    return answers[0] if single else {"flowers": answers}


def is_flower(row):
    # bool is a kind of int in Python, and not a measure.
    return isinstance(row, dict) and all(
        isinstance(row.get(name), (int, float)) and not isinstance(row.get(name), bool) for name in MEASURES
    )


def problem(text):
    return {"statusCode": 400, "body": {"error": text}}
