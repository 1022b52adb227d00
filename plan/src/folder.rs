//! Requirements files, measured by the Python of this machine.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, bail, ensure};
use sock_crds::{Index, PackageSetSpec, Requirements};
use sock_lock::Requirement;
use sock_plan::report::{Answer, Report};
use sock_plan::shelf::Wish;

use tokio::process::Command;

use crate::Plan;
use crate::costs::Costs;
use crate::given::{Given, LeftOut, MEASURE, extras, key, pinned, shown};
use crate::stop::{Interrupted, Stop};

/// Reads and measures every file.
///
/// # Errors
/// A file cannot be read or holds a line that is not pinned and hashed; there is no Python; the user wants no more.
pub async fn gather(plan: &Plan, costs: &mut Costs, stop: &mut Stop) -> Result<Given> {
    if let Some(url) = plan.index.as_ref().filter(|url| url.contains('@')) {
        let host = url.rsplit('@').next().unwrap_or_default();
        bail!("--index: PackageSets hold no user or password, give the address without: ...{host}");
    }
    let files = files(&plan.paths)?;
    let python = stop
        .unless(output(Command::new(&plan.python).arg("-VV")))
        .await;
    let python = python.with_context(|| format!("--python: {}", plan.python))?;
    let mut given = Given::default();
    for (count, file) in files.iter().enumerate() {
        let name = name(file)?;
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let requirements = pinned(&text).with_context(|| file.display().to_string())?;
        let lines: Vec<String> = requirements.iter().map(|(_, line)| line.clone()).collect();
        ensure!(
            given.taken.insert((String::new(), name.clone())),
            "{}: another file has the name {name} too",
            file.display()
        );
        let key = key(python.trim(), &plan.image, &lines.join("\n"), &[]);
        let report = match costs.get(&key) {
            Some(report) => report.clone(),
            None => {
                eprintln!("measuring {name} ({} of {})", count + 1, files.len());
                match stop.unless(measure(plan, &requirements)).await {
                    Ok(report) => {
                        costs.keep(key, report.clone())?;
                        report
                    }
                    Err(error) if error.is::<Interrupted>() => return Err(error),
                    Err(error) => {
                        given.left_out.push(LeftOut {
                            namespace: String::new(),
                            name: file.display().to_string(),
                            extends: None,
                            why: shown(&format!("{error:#}")),
                        });
                        continue;
                    }
                }
            }
        };
        let spec = PackageSetSpec {
            imports: report.imports.keys().cloned().collect(),
            requirements: Some(Requirements {
                lines: Some(lines),
                config_map_key_ref: None,
            }),
            index: plan.index.as_ref().map(|url| Index {
                url: url.clone(),
                secret_ref: None,
            }),
            ..spec(&plan.image)?
        };
        given.wishes.push(Wish {
            namespace: String::new(),
            name,
            spec,
            labels: Default::default(),
            annotations: Default::default(),
            requirements,
            now: None,
            functions: 1,
            report,
        });
    }
    Ok(given)
}

fn spec(image: &str) -> Result<PackageSetSpec> {
    Ok(serde_json::from_value(serde_json::json!({"image": image}))?)
}

fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let shown = || path.display().to_string();
        let mut found = Vec::new();
        for entry in std::fs::read_dir(path).with_context(shown)? {
            let file = entry.with_context(shown)?.path();
            if file.extension() == Some(OsStr::new("txt")) {
                found.push(file);
            }
        }
        ensure!(!found.is_empty(), "{} holds no *.txt", path.display());
        found.sort();
        files.extend(found);
    }
    Ok(files)
}

/// A name that a PackageSet may have.
fn name(file: &Path) -> Result<String> {
    let stem = file.file_stem().and_then(OsStr::to_str).unwrap_or_default();
    let name: String = stem
        .to_ascii_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let name: String = name
        .trim_start_matches(|c: char| !c.is_ascii_lowercase())
        .chars()
        .take(50)
        .collect();
    let name = name.trim_end_matches('-');
    if name.is_empty() {
        bail!(
            "{}: a PackageSet cannot have its name: begin it with a letter",
            file.display()
        );
    }
    Ok(name.to_owned())
}

/// Installs what the lines say, as a pool would, and measures it. Dropped, it leaves no process and no file.
async fn measure(plan: &Plan, requirements: &[(Requirement, String)]) -> Result<Report> {
    let folder = tempfile::tempdir()?;
    let site = folder.path().join("site-packages");
    let file = folder.path().join("requirements.txt");
    let lines: Vec<&str> = requirements.iter().map(|(_, line)| &**line).collect();
    std::fs::create_dir(&site)?;
    std::fs::write(&file, lines.join("\n") + "\n")?;
    let mut install = Command::new(&plan.python);
    install.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]);
    install.args([
        "--require-hashes",
        "--only-binary",
        ":all:",
        "--compile",
        "--target",
    ]);
    install.arg(&site).arg("--requirement").arg(&file);
    if let Some(index) = &plan.index {
        install.args(["--index-url", index]);
    }
    output(&mut install).await.context("pip install")?;
    let script = folder.path().join("measure.py");
    std::fs::write(&script, MEASURE)?;
    let asked = serde_json::json!({"imports": [], "extras": extras(requirements)});
    let mut measure = Command::new(&plan.python);
    measure.arg(&script).arg(&site).arg(asked.to_string());
    let said = output(&mut measure).await?;
    let answer: Answer = serde_json::from_str(&said).context("what the measurement says")?;
    answer.report().map_err(anyhow::Error::msg)
}

/// What a program prints.
async fn output(command: &mut Command) -> Result<String> {
    let done = command
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{}", reason(&said));
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// pip says what is wrong in its last line that begins with ERROR, other programs in their last.
fn reason(said: &str) -> &str {
    let lines: Vec<&str> = said
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let error = lines.iter().rev().find(|line| line.starts_with("ERROR:"));
    error
        .or(lines.last())
        .map_or("it failed and said nothing", |line| line.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gives_a_set_its_name() -> Result<()> {
        assert_eq!(name(Path::new("a/My_Model.v2.txt"))?, "my-model-v2");
        assert_eq!(name(Path::new("2-etl_.txt"))?, "etl");
        assert!(name(Path::new("123.txt")).is_err());
        assert_eq!(
            name(Path::new(&format!("{}.txt", "x".repeat(80))))?.len(),
            50
        );
        Ok(())
    }

    #[test]
    fn the_reason_is_the_last_error() {
        assert_eq!(reason("ERROR: a\nERROR: b\n[notice] c\n"), "ERROR: b");
        assert_eq!(reason("Traceback\nValueError: x\n\n"), "ValueError: x");
        assert_eq!(reason(""), "it failed and said nothing");
    }
}
