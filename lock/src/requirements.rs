//! Reads a requirements file of the one kind that is installed: every line pinned and hashed, nothing else.
//!
//! pip's format (<https://pip.pypa.io/en/stable/reference/requirements-file-format/>) without its options: what is
//! installed must follow from the lines alone.

use std::collections::BTreeMap;
use std::fmt;

/// A pinned and hashed requirement.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Requirement {
    /// Name of the project in its normal form (PEP 503): lower case, `-` for every run of `-`, `_` and `.`.
    pub name: String,
    /// Its version.
    pub version: String,
    /// For which machines it counts (PEP 508); none if for all.
    pub marker: Option<String>,
    /// Where it begins, from 1.
    pub line: usize,
}

/// A line that is not of that kind.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RequirementError {
    /// Its number, from 1.
    pub line: usize,
    /// What is wrong and what to do.
    pub problem: String,
}

impl fmt::Display for RequirementError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.problem)
    }
}

impl std::error::Error for RequirementError {}

/// Reads the text of a requirements file. Comments, empty lines and continued lines are as in pip's.
///
/// # Errors
/// The first line that is not pinned and hashed, is an option, or names a project a second time.
pub fn requirements(text: &str) -> Result<Vec<Requirement>, RequirementError> {
    let mut found: Vec<Requirement> = Vec::new();
    let mut known: BTreeMap<(String, Option<String>), usize> = BTreeMap::new();
    for (line, text) in logical_lines(text) {
        let error = |problem| RequirementError { line, problem };
        let requirement = requirement(line, &text).map_err(error)?;
        // One project may stand there several times for different machines, but not beside a line for all.
        let name = &requirement.name;
        let earlier = known
            .range((name.clone(), None)..)
            .take_while(|((of, _), _)| of == name)
            .find(|((_, marker), _)| {
                marker.is_none() || requirement.marker.is_none() || *marker == requirement.marker
            });
        if let Some((_, earlier)) = earlier {
            return Err(error(format!(
                "{name} is listed already in line {earlier}: keep one of them"
            )));
        }
        known.insert((name.clone(), requirement.marker.clone()), line);
        found.push(requirement);
    }
    Ok(found)
}

/// Lines with what continues them, without comments, each with the number of its first, from 1; those that are then empty are left out.
pub fn logical_lines(text: &str) -> Vec<(usize, String)> {
    let mut lines = Vec::new();
    let mut open: Option<(usize, String)> = None;
    for (index, line) in text.lines().enumerate() {
        let (number, mut whole) = open.take().unwrap_or((index + 1, String::new()));
        let comment = line.char_indices().find(|(at, c)| {
            *c == '#'
                && line[..*at]
                    .chars()
                    .next_back()
                    .is_none_or(char::is_whitespace)
        });
        let bare = comment.map_or(line, |(at, _)| &line[..at]);
        match bare.strip_suffix('\\') {
            Some(part) => {
                whole.push_str(part);
                whole.push(' ');
                open = Some((number, whole));
            }
            None => {
                whole.push_str(bare);
                lines.push((number, whole));
            }
        }
    }
    lines.extend(open);
    lines.retain_mut(|(_, line)| {
        *line = line.trim().to_owned();
        !line.is_empty()
    });
    lines
}

fn requirement(line: usize, text: &str) -> Result<Requirement, String> {
    const FORM: &str =
        "give NAME==VERSION --hash=sha256:..., as `uv pip compile --generate-hashes` writes it";
    if text.starts_with('-') {
        let option = text.split([' ', '=']).next().unwrap_or_default();
        return Err(format!(
            "option {option} is not taken: list every package itself, and name the index in spec.index"
        ));
    }
    let (head, hashes) = match text.find(" --") {
        Some(at) => (&text[..at], &text[at..]),
        None => (text, ""),
    };
    let shown: String = head.chars().take(120).collect();
    let (project, marker) = match head.split_once(';') {
        Some((project, marker)) => (project.trim(), Some(marker.trim().to_owned())),
        None => (head.trim(), None),
    };
    let Some((name, version)) = project.split_once("==") else {
        return Err(format!("{shown:?} is not pinned: {FORM}"));
    };
    let (name, extras) = match name.split_once('[') {
        Some((name, extras)) => (name.trim_end(), Some(extras)),
        None => (name.trim_end(), None),
    };
    let word = |text: &str, others: &str| {
        !text.is_empty()
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || others.contains(c))
    };
    let edges = name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.ends_with(|c: char| c.is_ascii_alphanumeric());
    if !word(name, "._-") || !edges {
        return Err(format!("{name:?} is no name of a project: {FORM}"));
    }
    if extras.is_some_and(|extras| {
        extras
            .trim_end()
            .strip_suffix(']')
            .is_none_or(|extras| !word(extras, "._-, "))
    }) {
        return Err(format!("the extras of {name} are malformed: {FORM}"));
    }
    let version = version.trim();
    if !word(version, ".!+_") {
        return Err(format!(
            "{version:?} is no version of {name} that could be pinned: {FORM}"
        ));
    }
    // Without "-", no option can hide in it.
    if marker
        .as_ref()
        .is_some_and(|marker| !word(marker, "_.<>=!~'\"(), "))
    {
        return Err(format!("the marker of {name} is malformed: {FORM}"));
    }
    let mut hashed = false;
    for option in hashes.split_whitespace() {
        let hash = option.strip_prefix("--hash=sha256:");
        if !hash.is_some_and(|hash| {
            hash.len() == 64
                && hash
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        }) {
            let shown: String = option.chars().take(90).collect();
            return Err(format!(
                "{shown:?} of {name} is no --hash=sha256: with 64 digits of lower-case hex"
            ));
        }
        hashed = true;
    }
    if !hashed {
        return Err(format!("{name}=={version} has no hash: {FORM}"));
    }
    Ok(Requirement {
        name: normal(name),
        version: version.to_owned(),
        marker,
        line,
    })
}

/// PEP 503's normal form of a name.
fn normal(name: &str) -> String {
    let mut normal = String::with_capacity(name.len());
    for c in name.chars() {
        match c {
            '-' | '_' | '.' if normal.ends_with('-') => {}
            '-' | '_' | '.' => normal.push('-'),
            c => normal.push(c.to_ascii_lowercase()),
        }
    }
    normal
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HASH: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn a_lock_file_as_uv_writes_it() {
        let text = format!(
            "# made by uv\n\nNum.Py[extra]==2.3.1 ; python_version >= '3.10' \\\n    --hash=sha256:{HASH} \\\n    --hash=sha256:{HASH}\n    # via -r in\nsix==1.17.0 --hash=sha256:{HASH} # why\n"
        );
        let found = requirements(&text).unwrap();
        let seen: Vec<_> = found
            .iter()
            .map(|r| (r.name.as_str(), r.version.as_str(), r.line))
            .collect();
        assert_eq!(seen, [("num-py", "2.3.1", 3), ("six", "1.17.0", 7)]);
        assert_eq!(found[0].marker.as_deref(), Some("python_version >= '3.10'"));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, words) in [
            ("\nsix", "line 2: \"six\" is not pinned"),
            ("six>=1.0", "is not pinned"),
            ("six==1.0", "six==1.0 has no hash"),
            ("six==1.* --hash=sha256:00", "\"1.*\" is no version of six"),
            (
                "six==1.0 --hash=md5:00",
                "\"--hash=md5:00\" of six is no --hash",
            ),
            (
                "six==1.0 --hash=sha256:00 --index-url=http://x",
                "\"--hash=sha256:00\" of six",
            ),
            ("--index-url http://x/", "option --index-url is not taken"),
            ("-r other.txt", "option -r is not taken"),
            ("git+https://x/y", "is not pinned"),
            (
                "six @ https://x/y==1 --hash=sha256:00",
                "is no name of a project",
            ),
            ("six[a==1.0 --hash=sha256:00", "extras of six"),
            ("six==1.0 ; os_name == 'x' -r y", "marker of six"),
        ] {
            let error = requirements(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn a_project_stands_there_once_for_each_machine() {
        let line = |head: &str| format!("{head} --hash=sha256:{HASH}\n");
        let twice = line("My_Pkg==1.0") + &line("six==1.0") + &line("my.pkg==1.1");
        assert_eq!(
            requirements(&twice).unwrap_err().to_string(),
            "line 3: my-pkg is listed already in line 1: keep one of them"
        );
        let machines = line("a==1 ; os_name == 'x'") + &line("a==2 ; os_name == 'y'");
        assert_eq!(requirements(&machines).unwrap().len(), 2);
        assert!(requirements(&(machines + &line("a==3"))).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused_with_a_line_of_it(text in "[ -~\n\\\\#]{0,400}") {
            let lines = text.lines().count();
            match requirements(&text) {
                Ok(found) => for requirement in found {
                    prop_assert!((1..=lines).contains(&requirement.line));
                    prop_assert!(!requirement.name.contains(['_', '.']));
                },
                Err(error) => prop_assert!((1..=lines).contains(&error.line)),
            }
        }

        #[test]
        fn what_is_taken_holds_no_option_but_hashes(head in "[a-z][a-z0-9]{0,8}==[0-9.]{1,5}", tail in "[ -~]{0,80}") {
            let text = format!("{head} --hash=sha256:{HASH}{tail}");
            if requirements(&text).is_ok() {
                let bare = text.split('#').next().unwrap();
                prop_assert!(bare.split_whitespace().skip(1).filter(|w| w.starts_with('-')).all(|w| w.starts_with("--hash=sha256:")));
            }
        }
    }
}
