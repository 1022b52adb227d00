"""Describes the numeric columns of a CSV file that is posted, and how they go together."""

import io

import pandas
from scipy import stats


def handler(event, context):
    if event["method"] != "POST" or not event["body"]:
        return problem("POST a CSV file with a header line")
    try:
        table = pandas.read_csv(io.BytesIO(event["body"]))
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
        return problem(f"this is not CSV: {error}")
    numbers = table.select_dtypes("number")
    if numbers.empty:
        return problem(f"none of the columns is numeric: {', '.join(map(str, table.columns))}")
    return {
        "rows": len(table),
        "columns": {str(name): describe(numbers[name].dropna()) for name in numbers},
        "correlations": correlations(numbers),
    }


def describe(column):
    low, middle, high = column.quantile([0.25, 0.5, 0.75])
    return {
        "count": int(column.count()),
        "mean": number(column.mean()),
        "deviation": number(column.std()),
        "minimum": number(column.min()),
        "quartiles": [number(low), number(middle), number(high)],
        "maximum": number(column.max()),
    }


def correlations(numbers):
    """Pearson's coefficient of each pair of columns, and the chance of one as large without any relation."""
    found = []
    names = list(numbers)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            pair = numbers[[first, second]].dropna()
            if len(pair) < 3 or pair[first].nunique() < 2 or pair[second].nunique() < 2:
                continue
            result = stats.pearsonr(pair[first], pair[second])
            found.append(
                {"columns": [str(first), str(second)], "r": number(result.statistic), "p": number(result.pvalue)}
            )
    return found


def number(value):
    """A JSON number; JSON has no NaN."""
    return None if pandas.isna(value) else float(value)


def problem(text):
    return {"statusCode": 400, "body": {"error": text}}
