//! Prints the definitions as YAML: `manifests/crds.yaml` is this output.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    print!("{}", sock_crds::yaml()?);
    Ok(())
}
