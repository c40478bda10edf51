{{- define "qlora-operator.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "qlora-operator.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains (include "qlora-operator.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "qlora-operator.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "qlora-operator.selector" -}}
app.kubernetes.io/name: {{ include "qlora-operator.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- /* Labels of everything that is installed; the chart's own override those of the values. */ -}}
{{- define "qlora-operator.labels" -}}
{{- $own := include "qlora-operator.selector" . | fromYaml -}}
{{- $own = set $own "app.kubernetes.io/version" (toString .Chart.AppVersion) -}}
{{- $own = set $own "app.kubernetes.io/managed-by" .Release.Service -}}
{{- $own = set $own "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version) -}}
{{- mergeOverwrite (dict) .Values.commonLabels $own | toYaml -}}
{{- end -}}

{{- /* Labels of an object that has some of its own in the values: `root` and `labels`. */ -}}
{{- define "qlora-operator.labelsWith" -}}
{{- mergeOverwrite (dict) .labels (include "qlora-operator.labels" .root | fromYaml) | toYaml -}}
{{- end -}}

{{- define "qlora-operator.podLabels" -}}
{{- mergeOverwrite (dict) .Values.commonLabels .Values.podLabels (include "qlora-operator.selector" . | fromYaml) | toYaml -}}
{{- end -}}

{{- define "qlora-operator.ipFamilies" -}}
{{- with .ipFamilyPolicy }}
  ipFamilyPolicy: {{ . }}
{{- end }}
{{- with .ipFamilies }}
  ipFamilies: {{ toJson . }}
{{- end }}
{{- end -}}

{{- define "qlora-operator.image" -}}
{{- $registry := .image.registry | default ((.root.Values.global | default dict).imageRegistry) -}}
{{- $repository := empty $registry | ternary .image.repository (printf "%s/%s" (toString $registry | trimSuffix "/") .image.repository) -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "qlora-operator.account" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "qlora-operator.fullname" .) -}}
{{- else -}}
{{- required "serviceAccount.name must name an account of the release's namespace where serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "qlora-operator.subjects" -}}
- {kind: ServiceAccount, name: {{ include "qlora-operator.account" . | quote }}, namespace: {{ .Release.Namespace | quote }}}
{{- end -}}
